"""Calibration only: nothing is learned."""
quantize_cfg = dict(levels=[], head_levels=[], pos=dict(mode='off'))
