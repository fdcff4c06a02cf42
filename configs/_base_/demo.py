"""The demo detector on generated shapes, made ready for quantization. Needs no data."""
_base_ = ['../demo/mask-rcnn_swin-demo_shapes.py', './pfcr.py']

model = dict(type='pfcr_mm.QuantDetector', arch='MaskRCNN')
load_from = 'pfcr_mm://demo_mask_rcnn_swin.pth'

# 320 of the training images and all 200 held-out ones, drawn on first use
data_root = 'work_dirs/demo/data/'
train_dataloader = dict(dataset=dict(data_root=data_root, num_images=320))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
default_hooks = dict(logger=dict(interval=1000))

quantize_cfg = dict(
    calibration=dict(images=288, held_out=32, search_images=32),
    reconstruction=dict(
        iters=60, batch_size=8, weight_lr=5e-4, scale_lr=5e-3, weight_scale_lr=1e-3,
        bias_lr=5e-4,
        per_level=dict(
            leaf=dict(iters=20),
            pair=dict(iters=80, weight_lr=5e-4),
            # weights of so much at once would learn the images by heart
            stage=dict(
                iters=60, weight_lr=0.0, weight_scale_lr=0.0, scale_lr=3e-3, bias_lr=2e-3,
                norm_lr=2e-3),
            backbone=dict(
                iters=60, weight_lr=0.0, weight_scale_lr=0.0, scale_lr=3e-3, bias_lr=2e-3,
                norm_lr=2e-3))),
    head_reconstruction=dict(
        iters=100,
        per_level=dict(
            leaf=dict(iters=100), chain=dict(iters=100, weight_lr=3e-4, scale_lr=3e-3))),
    rois=dict(proposals=32, detections=8),
    cache_dtype=None)
