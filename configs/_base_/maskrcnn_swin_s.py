"""Mask R-CNN Swin-S, 3x, on COCO: the zoo's detector made ready for quantization."""
_base_ = ['mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py', './pfcr.py']

model = dict(type='pfcr_mm.QuantDetector', arch='MaskRCNN')
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_20210903_104808-b92c91f1.pth'  # noqa: E501
quantize_cfg = dict(expected=dict(bbox_mAP=0.482, segm_mAP=0.432))
randomness = dict(seed=0)
