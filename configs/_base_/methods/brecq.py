"""BRECQ (arXiv 2102.05426): blocks; roundings under float activations, then activation scales."""
method = 'BRECQ'
model = dict(
    quant=dict(
        rounding='adaround', reparam=False, softmax=dict(kind='uniform', granularity='tensor'),
        matmul_granularity='tensor', class_tokens='shared', centre_queries=False))
quantize_cfg = dict(
    calibration=dict(method='mse', compensate=None, feed_back=False),
    levels=['block'], head_levels=['chain'],
    pos=dict(
        mode='steps',
        steps=[
            dict(activations='float', reconstruction=dict(bias_lr=0.0)),
            dict(learn='scales', shrink=0.25)
        ]),
    reconstruction=dict(loss='mse', input_mix=1.0, keep_prob=1.0),
    head_reconstruction=dict(input_mix=1.0, keep_prob=1.0))
