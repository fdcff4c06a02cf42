"""ViT-S/16 on ImageNet, 6-bit weights, 6-bit activations."""
_base_ = '../_base_/vit_s.py'

model = dict(quant=dict(weight_bits=6, activation_bits=6))
