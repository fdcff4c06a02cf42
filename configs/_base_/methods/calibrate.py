"""Calibration only: nothing is learned by gradients."""
method = 'calibration only'
quantize_cfg = dict(levels=[], head_levels=[], pos=dict(mode='off'))
