"""DeiT-S/16 on ImageNet, 3-bit weights, 3-bit activations."""
_base_ = '../_base_/deit_s.py'

model = dict(quant=dict(weight_bits=3, activation_bits=3))
