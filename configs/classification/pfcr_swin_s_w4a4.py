"""Swin-S on ImageNet, 4-bit weights, 4-bit activations."""
_base_ = '../_base_/swin_s.py'

model = dict(quant=dict(weight_bits=4, activation_bits=4))
