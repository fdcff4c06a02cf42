"""Mask R-CNN ViT-Ti on COCO-mini, 3-bit weights, 3-bit activations."""
_base_ = '../_base_/coco_mini.py'

model = dict(quant=dict(weight_bits=3, activation_bits=3))
work_dir = 'work_dirs/coco_mini_w3a3'
