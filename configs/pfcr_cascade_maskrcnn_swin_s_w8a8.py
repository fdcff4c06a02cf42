"""Cascade Mask R-CNN Swin-S on COCO, 8-bit weights, 8-bit activations."""
_base_ = './_base_/cascade_maskrcnn_swin_s.py'

model = dict(quant=dict(weight_bits=8, activation_bits=8))
