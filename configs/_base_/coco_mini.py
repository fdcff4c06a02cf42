"""Mask R-CNN ViT-Ti on a few hundred COCO images, made ready for quantization.

Train the float detector first; data and weights as its config says. 96 of the 215 training
images, drawn by seed, calibrate. The other 119 are evaluated on; the detector was trained on
them, so take the difference between float and quantized, not the figures. `--split val`
evaluates on the 103 val images.
"""
_base_ = ['../coco_mini/mask-rcnn_vit-ti_coco-mini.py', './pfcr.py']

model = dict(type='pfcr_mm.QuantDetector', arch='MaskRCNN')
load_from = 'work_dirs/coco_mini_float/iter_4400.pth'
default_hooks = dict(logger=dict(interval=1000))

data_root = '{{$COCO_MINI:data/coco_mini/}}'
source = data_root + 'annotations/instances_train2017.json'
images = dict(img=data_root + 'train2017/')
parts = 'work_dirs/coco_mini/annotations/'
train_dataloader = dict(
    dataset=dict(
        _delete_=True, type='pfcr_mm.DrawnCoco', source=source, data_prefix=images,
        ann_file=parts + 'calibration.json', draw=dict(count=96, seed=0),
        pipeline={{_base_.test_pipeline}}))
test_dataloader = dict(
    dataset=dict(
        _delete_=True, type='pfcr_mm.DrawnCoco', source=source, data_prefix=images,
        ann_file=parts + 'rest.json', draw=dict(count=96, seed=0, rest=True), test_mode=True,
        pipeline={{_base_.test_pipeline}}))
test_evaluator = dict(ann_file=parts + 'rest.json')

quantize_cfg = dict(
    calibration=dict(
        images=96, held_out=16, search_images=80, compensate=0.01, feed_back=True),
    levels=['leaf', 'block', 'pair', 'quad', 'backbone'],
    head_levels=['leaf', 'chain', 'detector'],
    # as for ViT-Ti on ImageNet: half of the values stay float meanwhile (QDrop), blocks have
    # most of the iterations, and coarse units move little
    reconstruction=dict(
        iters=20, batch_size=4, weight_lr=2e-4, scale_lr=5e-3, weight_scale_lr=4e-4,
        bias_lr=2e-4, keep_prob=0.5, input_mix=0.5,
        per_level=dict(
            block=dict(iters=100),
            pair=dict(iters=40, weight_lr=1e-4),
            quad=dict(iters=40, weight_lr=5e-5, scale_lr=1e-3),
            backbone=dict(iters=40, weight_lr=2e-5, scale_lr=1e-3))),
    head_reconstruction=dict(
        iters=100,
        per_level=dict(
            leaf=dict(iters=100), chain=dict(iters=100, weight_lr=1e-4, scale_lr=3e-3),
            detector=dict(iters=120))),
    rois=dict(proposals=32, detections=8))
