"""Mask R-CNN ViT-Ti on COCO-mini, 6-bit weights, 6-bit activations."""
_base_ = '../_base_/coco_mini.py'

model = dict(quant=dict(weight_bits=6, activation_bits=6))
work_dir = 'work_dirs/coco_mini_w6a6'
