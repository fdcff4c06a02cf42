"""PFCR without POS: one stage."""
quantize_cfg = dict(pos=dict(mode='off'))
