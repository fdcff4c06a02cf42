"""PFCR with POS read as activations first, then weights too."""
quantize_cfg = dict(pos=dict(mode='operand'))
