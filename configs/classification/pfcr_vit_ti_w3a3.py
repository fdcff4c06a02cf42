"""ViT-Ti/16 on 500 ImageNet images, 3-bit weights, 3-bit activations."""
_base_ = '../_base_/vit_ti.py'

model = dict(quant=dict(weight_bits=3, activation_bits=3))
