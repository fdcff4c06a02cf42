"""The demo detector: a small Swin Mask R-CNN on generated shapes (float training).

Trained in two legs (seed 0; 54 and 29 minutes on a shared two-core CPU), from random weights:

    python tools/train.py configs/demo/mask-rcnn_swin-demo_shapes_leg1.py
    python tools/train.py configs/demo/mask-rcnn_swin-demo_shapes.py
    python tools/publish.py work_dirs/demo_float/epoch_2.pth pfcr_mm/assets/demo_mask_rcnn_swin.pth
"""
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

num_classes = 6
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        embed_dims=32, depths=[2, 2, 4, 2], num_heads=[2, 4, 8, 8], drop_path_rate=0.05,
        convert_weights=False, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    rpn_head=dict(
        in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=64, finest_scale=28, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(
            out_channels=64, finest_scale=28, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(
            num_convs=2, in_channels=64, conv_out_channels=64, num_classes=num_classes)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=400, max_per_img=200),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=400, max_per_img=200)))

data_root = 'data/shapes/'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        _delete_=True, type='pfcr_mm.ShapesDataset', data_root=data_root, split='train',
        num_images=7500, filter_cfg=dict(filter_empty_gt=True), pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True, type='pfcr_mm.ShapesDataset', data_root=data_root, split='val',
        num_images=200, test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

max_epochs = 2
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=0, end=max_epochs, by_epoch=True,
         convert_to_iter_based=True)
]
optim_wrapper = dict(
    optimizer=dict(lr=6e-4), clip_grad=dict(max_norm=5.0, norm_type=2))
auto_scale_lr = dict(enable=False)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1), logger=dict(interval=100))
randomness = dict(seed=0)
load_from = 'work_dirs/demo_float_leg1/epoch_3.pth'
work_dir = 'work_dirs/demo_float'
