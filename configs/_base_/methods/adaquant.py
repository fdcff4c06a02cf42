"""AdaQuant (arXiv 2006.10518): one layer at a time, latent weights, biases and all scales."""
method = 'AdaQuant'
model = dict(quant=dict(softmax=dict(kind='uniform')))
quantize_cfg = dict(
    levels=['layer'], head_levels=['layer'], pos=dict(mode='off'),
    reconstruction=dict(loss='mse', input_mix=1.0, keep_prob=1.0),
    head_reconstruction=dict(input_mix=1.0, keep_prob=1.0))
