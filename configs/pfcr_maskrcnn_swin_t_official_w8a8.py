"""Mask R-CNN Swin-T (official weights) on COCO, 8-bit weights, 8-bit activations."""
_base_ = './_base_/maskrcnn_swin_t_official.py'

model = dict(quant=dict(weight_bits=8, activation_bits=8))
