"""A tiny Cascade Mask R-CNN out of our own config, for tests."""
import copy
from pathlib import Path

import torch
from demo_runs import options_as_dict
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny_models import randomise

CONFIG = (Path(__file__).parents[1] / 'configs' / 'pfcr_cascade_maskrcnn_swin_t_w4a4.py')
STAGES = range(3)
# Widths and depths alone: stages, batch norms, coders and extractors are the config's.
TINY = (
    'model.backbone.embed_dims=8', 'model.backbone.depths=[1,1,2,1]',
    'model.backbone.num_heads=[1,1,2,2]', 'model.neck.in_channels=[8,16,32,64]',
    'model.neck.out_channels=16', 'model.rpn_head.in_channels=16',
    'model.rpn_head.feat_channels=16', 'model.rpn_head.anchor_generator.scales=[4]',
    'model.roi_head.bbox_roi_extractor.out_channels=16',
    'model.roi_head.mask_roi_extractor.out_channels=16',
    'model.roi_head.bbox_roi_extractor.finest_scale=28',
    *(f'model.roi_head.bbox_head.{stage}.{option}' for stage in STAGES
      for option in ('in_channels=16', 'conv_out_channels=16', 'fc_out_channels=32',
                     'num_shared_convs=2', 'num_classes=6')),
    'model.roi_head.mask_head.num_convs=1', 'model.roi_head.mask_head.in_channels=16',
    'model.roi_head.mask_head.conv_out_channels=16', 'model.roi_head.mask_head.num_classes=6',
    'model.test_cfg.rpn.max_per_img=30', 'model.test_cfg.rcnn.max_per_img=10')


def model_config():
    """The `model` entry, with QuantDetector as its type."""
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(options_as_dict(TINY))
    return cfg.model


def build_float(seed=0):
    """mmdet's own cascade with seeded weights and batch-norm statistics."""
    model = copy.deepcopy(model_config())
    arch = model.pop('arch')
    model.pop('quant')
    detector = MODELS.build(dict(model, type=arch, _scope_='mmdet'))
    return with_statistics(randomise(detector, seed), seed).eval().requires_grad_(False)


def build_quantized(state=None):
    """The quantized cascade, W4A4; with `state` loaded as any mm tool does."""
    detector = MODELS.build(copy.deepcopy(model_config())).eval().requires_grad_(False)
    if state is not None:
        detector.wants_float = True
        detector.load_state_dict(state, strict=False)
    return detector


@torch.no_grad()
def with_statistics(model, seed=0):
    """Batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            module.weight.copy_(1 + 0.3 * torch.randn(module.num_features, generator=generator))
            module.bias.copy_(0.2 * torch.randn(module.num_features, generator=generator))
    return model
