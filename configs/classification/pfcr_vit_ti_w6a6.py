"""ViT-Ti/16 on 500 ImageNet images, 6-bit weights, 6-bit activations."""
_base_ = '../_base_/vit_ti.py'

model = dict(quant=dict(weight_bits=6, activation_bits=6))
