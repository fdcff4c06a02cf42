"""PFCR with POS read as two sweeps, the second from blocks on."""
quantize_cfg = dict(pos=dict(mode='unit'))
