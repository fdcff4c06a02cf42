"""ViTDet Mask R-CNN ViT-B on COCO, 6-bit weights, 6-bit activations."""
_base_ = './_base_/maskrcnn_vit_b.py'

model = dict(quant=dict(weight_bits=6, activation_bits=6))
