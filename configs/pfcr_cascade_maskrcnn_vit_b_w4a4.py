"""ViTDet Cascade Mask R-CNN ViT-B on COCO, 4-bit weights, 4-bit activations."""
_base_ = './_base_/cascade_maskrcnn_vit_b.py'

model = dict(quant=dict(weight_bits=4, activation_bits=4))
