"""ViTDet Cascade Mask R-CNN ViT-B on COCO, made ready for quantization.

No checkpoint of it is published in mmdet's naming (detectron2 has one of its own): give
the path of yours as CHECKPOINT, or set load_from.
"""
_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', './vitdet_coco.py']

norm_cfg = dict(type='pfcr_mm.LN2d')
model = dict(
    type='pfcr_mm.QuantDetector', arch='CascadeRCNN',
    backbone=dict(
        _delete_=True, type='pfcr_mm.TimmViT', model_name='vit_base_patch16_224', window_size=14,
        global_blocks=(2, 5, 8, 11), rel_pos=True, rel_pos_img_size=1024, norm_eps=1e-5,
        pos_antialias=False, drop_path_rate=0.1),
    neck=dict(
        _delete_=True, type='pfcr_mm.SimpleFPN', backbone_channel=768, out_channels=256,
        num_outs=5, norm_cfg=norm_cfg),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(
                type='Shared4Conv1FCBBoxHead', in_channels=256, conv_out_channels=256,
                fc_out_channels=1024, roi_feat_size=7, num_classes=80, norm_cfg=norm_cfg,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.],
                    target_stds=stds),
                reg_class_agnostic=True,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0))
            for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        ],
        mask_head=dict(norm_cfg=norm_cfg)))
