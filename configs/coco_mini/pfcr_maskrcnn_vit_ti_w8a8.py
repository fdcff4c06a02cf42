"""Mask R-CNN ViT-Ti on COCO-mini, 8-bit weights, 8-bit activations."""
_base_ = '../_base_/coco_mini.py'

model = dict(quant=dict(weight_bits=8, activation_bits=8))
work_dir = 'work_dirs/coco_mini_w8a8'
