"""DeiT-S/16, 224 pixels, on ImageNet (79.85% top-1), made ready for quantization."""
_base_ = './imagenet.py'

model_name = 'deit_small_patch16_224.fb_in1k'
model = dict(model_name=model_name)
pipeline = [dict(type='pfcr_mm.TimmPreprocess', model_name=model_name)]
train_dataloader = dict(dataset=dict(pipeline=pipeline))
test_dataloader = dict(dataset=dict(pipeline=pipeline))
load_from = 'timm://' + model_name
quantize_cfg = dict(expected=dict(top1=0.7985))
