"""Block-only reconstruction of the demo detector, W2A4: what PFCR is compared with.

Blocks, and the leaves outside of blocks; no POS. As many iterations in all as
pfcr_maskrcnn_swin_demo_w2a4.py has (14 x 204 against 2860 in the backbone).
"""
_base_ = '../_base_/demo.py'

method = 'blocks only'
model = dict(quant=dict(weight_bits=2, activation_bits=4))
quantize_cfg = dict(
    levels=['block'], pos=dict(mode='off'),
    reconstruction=dict(iters=204, per_level=dict(leaf=dict(iters=204))))
work_dir = 'work_dirs/demo_block_w2a4'
