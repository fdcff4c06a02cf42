"""ViTDet Mask R-CNN ViT-B (MAE, LSJ, 100 epochs) on COCO, made ready for quantization.

The detector of mmdet's ViTDet project (box AP 51.6, mask AP 45.7), on timm's ViT; that
project's checkpoint loads as it is.
"""
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', './vitdet_coco.py']

norm_cfg = dict(type='pfcr_mm.LN2d')
model = dict(
    type='pfcr_mm.QuantDetector', arch='MaskRCNN',
    backbone=dict(
        _delete_=True, type='pfcr_mm.TimmViT', model_name='vit_base_patch16_224', window_size=14,
        global_blocks=(2, 5, 8, 11), rel_pos=True, rel_pos_img_size=1024, norm_eps=1e-5,
        pos_antialias=False, drop_path_rate=0.1),
    neck=dict(
        _delete_=True, type='pfcr_mm.SimpleFPN', backbone_channel=768, out_channels=256,
        num_outs=5, norm_cfg=norm_cfg),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg)))
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/vitdet/vitdet_mask-rcnn_vit-b-mae_lsj-100e/vitdet_mask-rcnn_vit-b-mae_lsj-100e_20230328_153519-e15fe294.pth'
quantize_cfg = dict(expected=dict(bbox_mAP=0.516, segm_mAP=0.457))
