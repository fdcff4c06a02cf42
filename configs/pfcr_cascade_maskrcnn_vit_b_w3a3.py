"""ViTDet Cascade Mask R-CNN ViT-B on COCO, 3-bit weights, 3-bit activations."""
_base_ = './_base_/cascade_maskrcnn_vit_b.py'

model = dict(quant=dict(weight_bits=3, activation_bits=3))
