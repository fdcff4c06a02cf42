"""QDrop (arXiv 2203.05740) on our calibration: blocks, half of everything left float by chance."""
method = 'QDrop'
model = dict(quant=dict(rounding='adaround', softmax=dict(kind='uniform')))
quantize_cfg = dict(
    levels=['block'], head_levels=['chain'], pos=dict(mode='off'),
    reconstruction=dict(loss='mse', input_mix=0.5, keep_prob=0.5, bias_lr=0.0),
    head_reconstruction=dict(input_mix=0.5, keep_prob=0.5))
