"""Mask R-CNN Swin-S (official weights) on COCO, 3-bit weights, 3-bit activations."""
_base_ = './_base_/maskrcnn_swin_s_official.py'

model = dict(quant=dict(weight_bits=3, activation_bits=3))
