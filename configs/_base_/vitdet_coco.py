"""What ViTDet's detectors share on COCO: images in 1024x1024, padded; groups of blocks as units."""
_base_ = [
    'mmdet::_base_/datasets/coco_instance.py', 'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py', './pfcr.py'
]

test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(1024, 1024), keep_ratio=True),
    dict(type='Pad', size=(1024, 1024), pad_val=dict(img=(114, 114, 114))),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
randomness = dict(seed=0)

# two windowed blocks and a global one are a group, two groups a double
quantize_cfg = dict(
    levels=['leaf', 'block', 'pair', 'group', 'double', 'backbone'],
    reconstruction=dict(
        batch_size=1,
        per_level=dict(
            group=dict(iters=750, weight_lr=2e-5), double=dict(iters=750, weight_lr=2e-5))))
