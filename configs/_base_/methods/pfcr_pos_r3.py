"""PFCR with POS read as activations first, then weights too."""
method = 'PFCR, POS R3'
quantize_cfg = dict(pos=dict(mode='operand'))
