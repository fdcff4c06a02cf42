"""Mask R-CNN ViT-Ti on COCO-mini, 4-bit weights, 4-bit activations."""
_base_ = '../_base_/coco_mini.py'

model = dict(quant=dict(weight_bits=4, activation_bits=4))
work_dir = 'work_dirs/coco_mini_w4a4'
