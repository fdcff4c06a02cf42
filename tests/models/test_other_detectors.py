"""Detectors beyond Swin R-CNN: the generic path, and what it says of itself."""
import copy

import pytest
import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmengine.hub import get_config
from mmengine.registry import MODELS
from tiny_models import calibrated, predict, randomise
from torch import nn

from pfcr_mm.models import QuantConfig, State, convert, part_chains
from pfcr_mm.models.checkpoint import load_float, load_quantized, save_quantized
from pfcr_mm.modules import QuantLayer, QuantLinear, quantizers_of, set_quantization
from pfcr_mm.reconstruction.pfcr import harden

R18 = dict(depth=18, base_channels=8, init_cfg=None, norm_cfg=dict(type='BN'), style='pytorch')
NECK = dict(in_channels=[8, 16, 32, 64], out_channels=32)
HEAD = dict(in_channels=32, feat_channels=64, stacked_convs=1)  # two channels a group norm
# name -> (mmdet's config, changes, parts without a chain)
DETECTORS = dict(
    retinanet=('retinanet/retinanet_r18_fpn_1x_coco.py',
               dict(backbone=R18, neck=NECK, bbox_head=HEAD), {'backbone', 'bbox_head'}),
    fcos=('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
          dict(backbone=R18, neck=NECK, bbox_head=HEAD), {'backbone', 'bbox_head'}),
    atss=('atss/atss_r50_fpn_1x_coco.py',
          dict(backbone=R18, neck=NECK, bbox_head=HEAD), {'backbone', 'bbox_head'}),
    rtmdet=('rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
            dict(backbone=dict(widen_factor=0.0625, deepen_factor=0.1, init_cfg=None),
                 neck=dict(in_channels=[16, 32, 64], out_channels=16, num_csp_blocks=1),
                 bbox_head=dict(in_channels=16, feat_channels=16)),
            {'backbone', 'neck', 'bbox_head'}),
    pvt=('pvt/retinanet_pvt-t_fpn_1x_coco.py',
         dict(backbone=dict(num_layers=[1, 1, 1, 1], embed_dims=16, init_cfg=None),
              neck=dict(in_channels=[16, 32, 80, 128], out_channels=32), bbox_head=HEAD),
         {'backbone', 'bbox_head'}),
    pvtv2=('pvt/retinanet_pvtv2-b0_fpn_1x_coco.py',
           dict(backbone=dict(num_layers=[1, 1, 1, 1], embed_dims=8, init_cfg=None),
                neck=dict(in_channels=[8, 16, 40, 64], out_channels=32), bbox_head=HEAD),
           {'backbone', 'bbox_head'}))


def config(name):
    path, changes, _ = DETECTORS[name]
    model = get_config(f'mmdet::{path}').model
    for part, change in changes.items():
        model[part].update(change)
    if name in ('retinanet', 'pvt', 'pvtv2'):  # few boxes: a random head finds them everywhere
        model.bbox_head.num_classes = 3
    model.test_cfg.update(nms_pre=20, max_per_img=5)
    return model


def build(name, **quant):
    model = config(name)
    arch = model.pop('type')
    return MODELS.build(dict(
        model, type='pfcr_mm.QuantDetector', arch=arch,
        quant=dict(weight_bits=4, activation_bits=4, **quant))).requires_grad_(False)


def build_float(name):
    detector = MODELS.build(dict(config(name), _scope_='mmdet'))
    randomise(detector.requires_grad_(False)).eval()
    return detector


@pytest.fixture(scope='module', params=list(DETECTORS))
def name(request):
    return request.param


@pytest.fixture(scope='module')
def floating(name):
    return build_float(name)


@pytest.fixture(scope='module')
def detector(name, floating, images):
    """Float weights loaded, calibrated on two images, quantizers on."""
    detector = build(name)
    detector.eval()
    load_float(detector, dict(state_dict=floating.state_dict(), meta={}), 'float.pth')
    return calibrated(detector, images[:2])


def test_float_outputs_stay(name, floating, images):
    detector = build(name)
    detector.eval()
    load_float(detector, dict(state_dict=floating.state_dict(), meta={}), 'float.pth')
    for ours, theirs in zip(detector._forward(images[0][0]), floating._forward(images[0][0])):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_every_layer_is_calibrated_or_skipped_with_a_reason(detector):
    records = {r.name: r for r in detector.census}
    for layer, module in detector.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert isinstance(module, QuantLayer) == (records[layer].skipped_reason is None)
    for quantizer, module in quantizers_of(detector):
        assert module.calibrated and module.enabled, quantizer
    assert sum(r.skipped_reason is None for r in detector.census) > 15


def test_predictors_keep_eight_bits(detector):
    eight = {r.name.split('.')[1] for r in detector.census
             if r.weight_bits == 8 and r.name.startswith('bbox_head.')}
    assert any('cls' in name for name in eight) and any('reg' in name for name in eight)


def test_predicts(detector, floating, images):
    for inputs, samples in images[:2]:
        found = predict(detector, inputs, samples)
        assert len(found) > 0 and torch.isfinite(found.bboxes).all()
        ours, theirs = (d._forward(inputs)[0][0] for d in (detector, floating))
        assert ours.shape == theirs.shape and not torch.equal(ours, theirs)


def test_parts_without_a_chain_are_named(name, detector):
    chains, without = part_chains(detector)
    assert set(without) == DETECTORS[name][2]
    assert set(chains) | set(without) == {'backbone', 'neck', 'bbox_head'}
    assert all(type(getattr(detector, part)).__name__ in reason
               for part, reason in without.items())


def test_saved_and_loaded_it_computes_the_same(name, detector, images, tmp_path):
    saved = copy.deepcopy(detector)
    harden(saved)
    save_quantized(saved, tmp_path / 'quantized.pth', {})
    loaded = build(name)
    loaded.eval()
    checkpoint = torch.load(tmp_path / 'quantized.pth', weights_only=True)
    load_quantized(loaded, checkpoint, 'quantized.pth')
    for ours, theirs in zip(loaded._forward(images[0][0]), saved._forward(images[0][0])):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


# --- layers under several names ----------------------------------------------

class Shared(nn.Module):
    """One convolution for two levels, a norm each."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleDict(dict(conv=nn.Conv2d(2, 2, 1), norm=nn.GroupNorm(1, 2)))
            for _ in range(2))
        self.levels[1]['conv'] = self.levels[0]['conv']


def test_every_alias_is_the_same_quantized_layer():
    model = Shared()
    census = convert(model, QuantConfig())
    assert [r.name for r in census] == ['levels.0.conv']
    assert isinstance(model.levels[0]['conv'], QuantLayer)
    assert model.levels[1]['conv'] is model.levels[0]['conv']


def test_rtmdet_shares_over_levels(images):
    detector = build('rtmdet')
    head = detector.bbox_head
    for level in (1, 2):
        assert head.cls_convs[level][0].conv is head.cls_convs[0][0].conv
        assert isinstance(head.cls_convs[level][0].conv, QuantLayer)
        assert isinstance(head.cls_convs[level][0].bn, nn.modules.batchnorm._BatchNorm)
    assert len(detector.folded) > 10  # the backbone's own


def test_a_shared_layer_is_saved_once(tmp_path):
    """Three levels of names, one level of integers."""
    detector = build('rtmdet')
    for _, quantizer in quantizers_of(detector):
        quantizer.set_scale(torch.ones_like(quantizer.scale), torch.zeros_like(quantizer.scale))
    set_quantization(detector, True, True)
    harden(detector)
    save_quantized(detector, tmp_path / 'q.pth', {})
    state = torch.load(tmp_path / 'q.pth', weights_only=True)['state_dict']
    first, *others = (state[f'bbox_head.cls_convs.{level}.0.conv.weight_packed']
                      for level in range(3))
    assert all(other.data_ptr() == first.data_ptr() for other in others)


# --- nn.MultiheadAttention ---------------------------------------------------

def test_multihead_attention_is_skipped_with_a_reason():
    model = nn.Sequential(MultiheadAttention(8, 2), nn.Linear(8, 8))
    census = {r.name: r for r in convert(model, QuantConfig())}
    for name in ('0.attn', '0.attn.out_proj'):
        assert 'nn.MultiheadAttention' in census[name].skipped_reason
    assert not any(isinstance(m, QuantLayer) for m in model[0].modules())
    assert isinstance(model[1], QuantLinear)


# --- FPN with extra levels ---------------------------------------------------

@pytest.mark.parametrize('options', [
    dict(num_outs=6), dict(num_outs=6, add_extra_convs='on_input'),
    dict(num_outs=6, add_extra_convs='on_lateral'), dict(num_outs=6, add_extra_convs=True),
    dict(num_outs=5, add_extra_convs='on_output', relu_before_extra_convs=True, start_level=1),
    dict(num_outs=3, add_extra_convs='on_input', start_level=1),
    dict(num_outs=2, end_level=1),
], ids=lambda options: '-'.join(map(str, options.values())))
def test_fpn_chain(options):
    from mmdet.models.necks import FPN

    from pfcr_mm.registry import CHAINS
    fpn = FPN([4, 6, 8, 10], 5, **options).eval()
    maps = tuple(torch.randn(1, c, 32 // 2**i, 48 // 2**i) for i, c in enumerate((4, 6, 8, 10)))
    chain = CHAINS.find(fpn)(fpn)
    state, side = chain.run(State(maps))
    expected = fpn(maps)
    assert side == () and len(state.tensors) == len(expected) == options['num_outs']
    assert all(torch.equal(a, b) for a, b in zip(state.tensors, expected))
    owned = [id(m) for leaf in chain.leaves for root in leaf.modules for m in root.modules()
             if isinstance(m, nn.Conv2d)]
    assert sorted(owned) == sorted(id(m) for m in fpn.modules() if isinstance(m, nn.Conv2d))
