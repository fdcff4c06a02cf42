"""First leg of the demo detector's training: harder scenes, from random weights.

Stops after 3 of the 6 epochs that its learning rate is scheduled for.
"""
_base_ = './mask-rcnn_swin-demo_shapes.py'

model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(finest_scale=16, roi_layer=dict(sampling_ratio=0)),
        mask_roi_extractor=dict(finest_scale=16, roi_layer=dict(sampling_ratio=0))))
data_root = 'data/shapes_hard/'
train_dataloader = dict(
    dataset=dict(data_root=data_root, scene='hard', num_images=8000))
val_dataloader = dict(dataset=dict(data_root=data_root, scene='hard'))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=500),
    dict(type='CosineAnnealingLR', eta_min=1e-6, begin=0, end=6, by_epoch=True,
         convert_to_iter_based=True)
]
optim_wrapper = dict(optimizer=dict(lr=8e-4))
load_from = None
work_dir = 'work_dirs/demo_float_leg1'
