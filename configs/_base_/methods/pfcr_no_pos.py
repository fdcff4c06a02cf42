"""PFCR without POS: one stage."""
method = 'PFCR without POS'
quantize_cfg = dict(pos=dict(mode='off'))
