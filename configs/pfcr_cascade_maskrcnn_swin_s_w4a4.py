"""Cascade Mask R-CNN Swin-S on COCO, 4-bit weights, 4-bit activations."""
_base_ = './_base_/cascade_maskrcnn_swin_s.py'

model = dict(quant=dict(weight_bits=4, activation_bits=4))
