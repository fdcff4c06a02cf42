"""Mask R-CNN Swin-T, 3x, on COCO, with the official weights that published tables use."""
_base_ = './maskrcnn_swin_t.py'

load_from = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.2/mask_rcnn_swin_tiny_patch4_window7.pth'
quantize_cfg = dict(expected=dict(bbox_mAP=0.460, segm_mAP=0.416))
