"""Mask R-CNN on ViT-Ti, trained on a few hundred COCO images (float training).

Small enough for two CPU cores, real enough for experiments: photographs of all sizes,
crowds as RLE, images without boxes. Put or link the data and the ViT-Ti weights (a plain
timm state dict) where `data_root` and `pretrained` say, or name them in the environment:

    COCO_MINI=/my/coco_mini/ VIT_TINY=/my/vit_tiny_patch16_224.pth \
        python tools/train.py configs/coco_mini/mask-rcnn_vit-ti_coco-mini.py

What makes so short a training work at all: boxes and masks without classes, every block
attending globally as in pretraining, images seen 40 times and unflipped. It learns its
training images, and COCO hardly.
"""
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py'
]

data_root = '{{$COCO_MINI:data/coco_mini/}}'
pretrained = '{{$VIT_TINY:data/vit_tiny_patch16_224/vit_tiny_patch16_224.pth}}'
channels = 96
norm_cfg = dict(type='pfcr_mm.LN2d')
model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    # the last norm keeps ViT-Ti's few huge channels (hundreds, others are near 1) from the neck
    backbone=dict(
        _delete_=True, type='pfcr_mm.TimmViT', model_name='vit_tiny_patch16_224', window_size=0,
        final_norm=True, drop_path_rate=0.05, pretrained=pretrained),
    neck=dict(
        _delete_=True, type='pfcr_mm.SimpleFPN', backbone_channel=192, out_channels=channels,
        num_outs=5, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=channels, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=channels, finest_scale=14, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(in_channels=channels, fc_out_channels=512, reg_class_agnostic=True),
        mask_roi_extractor=dict(
            out_channels=channels, finest_scale=14, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(
            num_convs=2, in_channels=channels, conv_out_channels=channels, class_agnostic=True)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=64, pos_fraction=0.5))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(480, 288), keep_ratio=True),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(480, 288), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    dataset=dict(
        data_root=data_root, filter_cfg=dict(filter_empty_gt=False, min_size=1),
        pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_iters = 4400
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=100, end=max_iters)
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict(backbone=dict(lr_mult=0.2))),
    clip_grad=dict(max_norm=5.0, norm_type=2))
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=400, max_keep_ckpts=1), logger=dict(interval=20))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
work_dir = 'work_dirs/coco_mini_float'
