"""RepQ-ViT (arXiv 2212.08254): percentile scales, log-sqrt2 softmax, nothing is learned."""
method = 'RepQ-ViT'
model = dict(
    quant=dict(
        rounding='nearest', softmax=dict(kind='log_sqrt2', granularity='tensor'),
        post_gelu=dict(kind='uniform'), matmul_granularity='tensor',
        class_tokens='shared', balance_values=False, centre_heads=False, rotate_heads=False,
        centre_queries=False))
quantize_cfg = dict(
    calibration=dict(method='percentile', compensate=None, feed_back=False, fit_norms=False),
    levels=[], head_levels=[], pos=dict(mode='off'))
