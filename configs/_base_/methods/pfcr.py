"""PFCR with POS, as we read it: the granularity of quantization diminishes."""
method = 'PFCR'
quantize_cfg = dict(pos=dict(mode='quantizer'))
