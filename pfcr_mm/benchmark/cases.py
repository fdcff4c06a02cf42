"""The units that are measured, of small backbones with random weights."""
import copy
from dataclasses import dataclass

import torch
from mmdet.registry import MODELS as MMDET_MODELS

from ..errors import UsageError
from ..models import QuantConfig, State, convert
from ..models.backbones import TimmViT
from ..models.chain import Chain
from ..modules import set_quantization
from ..reconstruction import Unit, calibrate, observe, units_of
from ..reconstruction.cache import FeatureCache
from ..reconstruction.capture import Stream, Targets, advance
from ..registry import CHAINS

IMAGES = 16  # that a unit is reconstructed from, generated

SWIN_T = dict(embed_dims=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])
# Backbones, what is fed to each, and images a step: the demo's own; Swin-T and ViT-S at the size of
# a classifier's images; Swin-T and ViT-B as they are in detectors on COCO.
SIZES = dict(
    demo=dict(
        batch=8, shape=dict(swin=(128, 128), vit=(128, 128)),
        swin=dict(embed_dims=32, depths=[2, 2, 4, 2], num_heads=[2, 4, 8, 8]),
        vit=dict(model_name='vit_tiny_patch16_224', timm_args=dict(depth=2))),
    full=dict(
        batch=4, shape=dict(swin=(224, 224), vit=(224, 224)), swin=SWIN_T,
        vit=dict(model_name='vit_small_patch16_224', timm_args=dict(depth=2))),
    coco=dict(
        batch=2, shape=dict(swin=(800, 1344), vit=(1024, 1024)), swin=SWIN_T,
        vit=dict(model_name='vit_base_patch16_224', window_size=14, rel_pos=True,
                 rel_pos_img_size=1024, timm_args=dict(depth=2))))
# What is measured: of which backbone, which level, which of its units.
KINDS = dict(swin_block=('swin', 'block', 1), vit_block=('vit', 'block', 1),
             pair=('swin', 'pair', 0), stage=('swin', 'stage', 2))


@dataclass
class Case:
    """A unit with what flows into it.

    Args:
        kind (str): one of KINDS.
        model (nn.Module): the quantized backbone, calibrated and switched on.
        chain, float_chain (Chain): of it and of its float twin.
        unit (Unit): of both.
        inputs (Stream): the float input of the unit.
        targets (Targets): its float output.
        batch (int): images a step.
    """

    kind: str
    model: torch.nn.Module
    chain: Chain
    float_chain: Chain
    unit: Unit
    inputs: Stream
    targets: Targets
    batch: int

    @staticmethod
    def chain_of(model):
        """The chain of a copy of one of the backbones."""
        return CHAINS.find(model)(model)


def build_case(kind, size='demo', rounding='latent', bits=4, device='cpu'):
    """Build the unit `kind` of KINDS at one of SIZES, W4A4 by default, softmax included."""
    for value, table, key in ((kind, KINDS, 'kind'), (size, SIZES, 'size')):
        if value not in table:
            raise UsageError(f'{key}={value!r} is not known; choose one of {list(table)}')
    backbone, level, number = KINDS[kind]
    device = torch.device(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        floating = build_backbone(backbone, size)
        images = torch.randn(IMAGES, 3, *SIZES[size]['shape'][backbone])
        model = copy.deepcopy(floating)
        convert(model, QuantConfig(
            weight_bits=bits, activation_bits=bits, rounding=rounding))
        model.to(device)
        floating.to(device)
        with torch.no_grad(), observe(model, rows=256) as seen:
            model(images[:4].to(device))
        calibrate(model, seen, 'minmax')
    set_quantization(model, True, True)
    chain, float_chain = (Case.chain_of(m) for m in (model, floating))
    unit = units_of(chain, level)[number]
    stream = Stream([State((image[None], )) for image in images])
    cache = FeatureCache(torch.float16)
    inputs, _ = advance(float_chain, stream, 0, unit.start, device, cache=cache)
    targets = Targets(*advance(float_chain, inputs, unit.start, unit.stop, device, cache=cache))
    return Case(kind, model, chain, float_chain, unit, inputs, targets, SIZES[size]['batch'])


def build_backbone(name, size):
    """A float backbone, 'swin' or 'vit', in eval mode and without gradients."""
    options = SIZES[size][name]
    if name == 'swin':
        model = MMDET_MODELS.build(dict(
            type='SwinTransformer', _scope_='mmdet', drop_path_rate=0.0, **options))
    else:
        model = TimmViT(**options)
    model.init_weights()
    model.eval()  # mmdet's Swin returns None here
    return model.requires_grad_(False)
