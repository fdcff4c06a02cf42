"""Mask R-CNN Swin-S (official weights) on COCO, 6-bit weights, 6-bit activations."""
_base_ = './_base_/maskrcnn_swin_s_official.py'

model = dict(quant=dict(weight_bits=6, activation_bits=6))
