"""ViTDet Mask R-CNN ViT-B on COCO, 8-bit weights, 8-bit activations."""
_base_ = './_base_/maskrcnn_vit_b.py'

model = dict(quant=dict(weight_bits=8, activation_bits=8))
