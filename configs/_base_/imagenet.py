"""timm classifiers on ImageNet-1k, made ready for quantization: what their configs share.

Put or link the images to data/imagenet/, with a folder a class in train/ and in val/, or
name another place in the environment (IMAGENET=/my/imagenet/). A validation set without
folders takes a list of paths and class numbers instead:

    test_dataloader = dict(dataset=dict(ann_file='/my/val_labels.txt'))

Weights are timm's own, over the network; else give the path of a file as CHECKPOINT.
"""
_base_ = './pfcr.py'

default_scope = 'mmdet'
data_root = '{{$IMAGENET:data/imagenet/}}'
num_classes = 1000
model = dict(
    type='pfcr_mm.QuantDetector', arch='pfcr_mm.TimmClassifier', num_classes=num_classes,
    quant=dict(class_tokens='own', centre_queries=True))

train_dataloader = dict(
    batch_size=64, num_workers=4, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='pfcr_mm.ImageFolder', data_root=data_root + 'train', num_classes=num_classes))
test_dataloader = dict(
    batch_size=64, num_workers=4, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='pfcr_mm.ImageFolder', data_root=data_root + 'val', num_classes=num_classes))
test_evaluator = dict(type='pfcr_mm.TopK')
test_cfg = dict(type='TestLoop')
# MMEngine wants these beside a train_dataloader; nothing is trained
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-5))

quantize_cfg = dict(
    calibration=dict(
        images=1024, held_out=64, search_images=128, compensate=0.01, feed_back=True),
    # ViTs have no stages, Swins have quads in their long stage only
    levels=['leaf', 'block', 'pair', 'quad', 'stage', 'backbone'],
    reconstruction=dict(batch_size=32, per_level=dict(quad=dict(iters=750, weight_lr=2e-5))))
quantize_hooks = [*_base_.quantize_hooks, dict(type='pfcr_mm.AgreementHook')]
randomness = dict(seed=0)
