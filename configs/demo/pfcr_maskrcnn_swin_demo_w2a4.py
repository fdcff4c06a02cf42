"""The demo detector, 2-bit weights, 4-bit activations."""
_base_ = '../_base_/demo.py'

model = dict(quant=dict(weight_bits=2, activation_bits=4))
work_dir = 'work_dirs/demo_w2a4'
