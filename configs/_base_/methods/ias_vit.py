"""I&S-ViT (arXiv 2311.10126) in three stages: blocks with float weights and channel-wise
post-norm scales; exact reparameterisation; blocks with everything quantized.
"""
method = 'I&S-ViT'
quantize_cfg = dict(
    levels=['block'], head_levels=['chain'],
    pos=dict(
        mode='steps',
        steps=[
            dict(weights='float', norms='channel', parts=['backbone'],
                 reconstruction=dict(input_mix=0.0, scale_lr=0.0, weight_scale_lr=0.0)),
            # of a step: rates that a config has for a level are of other methods
            dict(reconstruction=dict(scale_lr=0.0, weight_scale_lr=0.0))
        ]),
    reconstruction=dict(loss='mse', input_mix=1.0, keep_prob=1.0),
    head_reconstruction=dict(input_mix=1.0, keep_prob=1.0))
