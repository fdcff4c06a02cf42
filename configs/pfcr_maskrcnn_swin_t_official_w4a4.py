"""Mask R-CNN Swin-T (official weights) on COCO, 4-bit weights, 4-bit activations."""
_base_ = './_base_/maskrcnn_swin_t_official.py'

model = dict(quant=dict(weight_bits=4, activation_bits=4))
