"""Calibration only: nothing is learned."""
method = 'calibration only'
quantize_cfg = dict(levels=[], head_levels=[], pos=dict(mode='off'))
