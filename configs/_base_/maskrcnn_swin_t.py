"""Mask R-CNN Swin-T, 3x, on COCO: the zoo's detector made ready for quantization."""
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py', './pfcr.py']

model = dict(type='pfcr_mm.QuantDetector', arch='MaskRCNN')
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco/mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco_20210906_131725-bacf6f7b.pth'  # noqa: E501
quantize_cfg = dict(expected=dict(bbox_mAP=0.460, segm_mAP=0.416))
randomness = dict(seed=0)
