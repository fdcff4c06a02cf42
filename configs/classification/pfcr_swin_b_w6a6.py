"""Swin-B on ImageNet, 6-bit weights, 6-bit activations."""
_base_ = '../_base_/swin_b.py'

model = dict(quant=dict(weight_bits=6, activation_bits=6))
