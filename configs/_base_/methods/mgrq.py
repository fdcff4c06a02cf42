"""MGRQ (arXiv 2406.09229): blocks, with the final output and every layer inside as guides."""
method = 'MGRQ'
model = dict(
    quant=dict(
        rounding='adaround', softmax=dict(kind='log_sqrt2', granularity='tensor'),
        class_tokens='shared', centre_queries=False))
quantize_cfg = dict(
    calibration=dict(method='percentile'), levels=['block'], head_levels=['chain'],
    pos=dict(mode='off'),
    reconstruction=dict(
        input_mix=0.5, keep_prob=1.0, bias_lr=0.0,
        loss=dict(
            _delete_=True, type='mixed',
            terms=[dict(type='mse'), dict(type='final'), dict(type='layers')])),
    head_reconstruction=dict(loss='mse', input_mix=0.5, keep_prob=1.0))
