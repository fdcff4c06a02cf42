"""ViT-Ti/16 on 500 ImageNet images, 4-bit weights, 4-bit activations."""
_base_ = '../_base_/vit_ti.py'

model = dict(quant=dict(weight_bits=4, activation_bits=4))
