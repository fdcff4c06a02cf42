"""ViT-Ti/16, 224 pixels, on 500 ImageNet images, made ready for quantization.

Small enough for two CPU cores, with real weights and photographs. Put or link images and
weights (a plain timm state dict) where `data_root` and `load_from` say, or name them in the
environment:

    IMAGENET_SAMPLE=/my/imagenet_sample/ VIT_TINY=/my/vit_tiny_patch16_224.pth \
        python tools/quant.py configs/classification/pfcr_vit_ti_w4a4.py

128 images, drawn by seed, calibrate; the other 372 are evaluated on. They may be training
images of the model: take the difference between float and quantized, not the figures.
"""
_base_ = './imagenet.py'

data_root = '{{$IMAGENET_SAMPLE:data/imagenet_sample/}}'
model_name = 'vit_tiny_patch16_224.augreg_in21k_ft_in1k'
model = dict(model_name=model_name)
pipeline = [dict(type='pfcr_mm.TimmPreprocess', model_name=model_name)]
train_dataloader = dict(
    dataset=dict(
        data_root=data_root, ann_file='labels.txt', draw=dict(count=128, seed=0),
        pipeline=pipeline))
test_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False,
    dataset=dict(
        data_root=data_root, ann_file='labels.txt', draw=dict(count=128, seed=0, rest=True),
        pipeline=pipeline))
load_from = '{{$VIT_TINY:data/vit_tiny_patch16_224/vit_tiny_patch16_224.pth}}'

quantize_cfg = dict(
    # 112 images to learn from are learned by heart: each is cut and mirrored seven times besides,
    # half of these views have a part of another one, and four are taken for classes that no image
    # has: there are 1000
    calibration=dict(
        images=128, held_out=16, search_images=128, views=8, cutmix=0.5, retargeted=0.5),
    # half of the values stay float meanwhile (QDrop); blocks have most of the iterations, and
    # coarse units move little
    reconstruction=dict(
        iters=20, batch_size=8, weight_lr=5e-4, scale_lr=5e-3, weight_scale_lr=4e-4,
        bias_lr=2e-4, loss='norm_mse', keep_prob=0.5, input_mix=0.5,
        per_level=dict(
            block=dict(iters=145),
            pair=dict(iters=40, weight_lr=1e-4, scale_lr=1e-3, keep_prob=0.75, input_mix=0.75),
            quad=dict(iters=40, weight_lr=5e-5, scale_lr=1e-3, keep_prob=1.0, input_mix=1.0),
            backbone=dict(
                # from end to end 112 images teach activation scales; weights learn the images
                iters=120, weight_lr=0.0, weight_scale_lr=0.0, bias_lr=0.0, scale_lr=1e-3,
                keep_prob=1.0, input_mix=1.0, loss='head_kl'))),
    cache_dtype=None)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1000))
