"""The demo detector, 3-bit weights, 3-bit activations."""
_base_ = '../_base_/demo.py'

model = dict(quant=dict(weight_bits=3, activation_bits=3))
work_dir = 'work_dirs/demo_w3a3'
