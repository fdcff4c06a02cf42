"""Cascade Mask R-CNN Swin-S, 3x, on COCO: the official detector made ready for quantization."""
_base_ = './cascade_maskrcnn_swin_t.py'

model = dict(backbone=dict(depths=[2, 2, 18, 2]))
load_from = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.2/cascade_mask_rcnn_swin_small_patch4_window7.pth'
quantize_cfg = dict(expected=dict(bbox_mAP=0.519, segm_mAP=0.450))
