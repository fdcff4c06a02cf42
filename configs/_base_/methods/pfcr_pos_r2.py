"""PFCR with POS read as two sweeps, the second from blocks on."""
method = 'PFCR, POS R2'
quantize_cfg = dict(pos=dict(mode='unit'))
