"""Mask R-CNN Swin-S, 3x, on COCO, with the official weights that published tables use."""
_base_ = './maskrcnn_swin_s.py'

load_from = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.2/mask_rcnn_swin_small_patch4_window7.pth'
quantize_cfg = dict(expected=dict(bbox_mAP=0.485, segm_mAP=0.433))
