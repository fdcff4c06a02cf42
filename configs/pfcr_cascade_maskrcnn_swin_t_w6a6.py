"""Cascade Mask R-CNN Swin-T on COCO, 6-bit weights, 6-bit activations."""
_base_ = './_base_/cascade_maskrcnn_swin_t.py'

model = dict(quant=dict(weight_bits=6, activation_bits=6))
