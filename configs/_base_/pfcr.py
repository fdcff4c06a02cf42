"""Mix-in: PFCR with POS, for any mmdet detector config.

Put it beside the detector's own config in `_base_`, and wrap the model:

    model = dict(type='pfcr_mm.QuantDetector', arch='MaskRCNN',
                 quant=dict(weight_bits=4, activation_bits=4))

It defines new keys only, so it inherits beside any other base.
"""
runner_type = 'pfcr_mm.QuantRunner'
quantize_cfg = dict(
    type='pfcr_mm.PFCRLoop',
    calibration=dict(
        images=256, held_out=32, search_images=32, method='output', compensate=None,
        feed_back=False, fit_norms=False),
    levels=['leaf', 'block', 'pair', 'stage', 'backbone'],
    head_levels=['leaf', 'chain'],
    traversal='post_order',
    pos=dict(mode='quantizer', stage1_levels=['leaf', 'block']),
    reconstruction=dict(
        iters=1000, batch_size=2, weight_lr=4e-5, scale_lr=1e-3, weight_scale_lr=1e-4,
        bias_lr=1e-4, loss='channel_mse',
        per_level=dict(
            pair=dict(iters=750, weight_lr=3e-5),
            stage=dict(iters=750, weight_lr=2e-5),
            backbone=dict(iters=1000, weight_lr=1e-5))),
    head_reconstruction=dict(iters=500),
    rois=dict(proposals=128, detections=32),
    cache_dtype='float16')
quantize_hooks = [
    dict(type='pfcr_mm.ProgressHook'),
    dict(type='pfcr_mm.UnitLogHook'),
    dict(type='pfcr_mm.ExpectedMetricsHook'),
    dict(type='pfcr_mm.ReportHook'),
    dict(type='pfcr_mm.UnitCheckpointHook', interval=0),
    dict(type='pfcr_mm.ScalarsHook'),
    dict(type='pfcr_mm.DiagnosticsHook'),
]
