"""Swapping layers in place, the census, and the mistakes a `quant` entry can have."""
import copy

import pytest
import torch
from mmcv.cnn.bricks import wrappers
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock, WindowMSA
from mmengine.hub import get_config
from mmengine.registry import MODELS
from torch import nn

from pfcr_mm.errors import UsageError
from pfcr_mm.models import QuantConfig, convert
from pfcr_mm.models.reparam import post_norm_pairs
from pfcr_mm.modules import QuantConv2d, QuantConvTranspose2d, QuantLinear, quantizers_of

SWIN_T = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'


class OwnLinear(nn.Linear):
    """A Linear whose forward is not the plain one."""

    def forward(self, x):
        return super().forward(x) * 2


class PlainLinear(nn.Linear):
    """A subclass that adds nothing to the forward."""


class OwnWindowMSA(WindowMSA):
    """A window attention that computes something else."""

    def forward(self, x, mask=None):
        return 2 * super().forward(x, mask)


class OwnShiftWindowMSA(ShiftWindowMSA):
    """A shifted one that does."""

    def forward(self, query, hw_shape):
        return query + super().forward(query, hw_shape)


def toy():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), PlainLinear(5, 5)),
        OwnLinear(5, 2), nn.ConvTranspose2d(2, 2, 2))


def census(model, **quant):
    return {r.name: r for r in convert(model, QuantConfig.from_dict(quant))}


# --- swapping ----------------------------------------------------------------

def test_layers_are_swapped_in_place():
    model = toy()
    weight = model[1][0].weight
    found = census(model)
    assert isinstance(model[0], QuantConv2d) and isinstance(model[1][0], QuantLinear)
    assert isinstance(model[1][2], QuantLinear) and isinstance(model[3], QuantConvTranspose2d)
    assert model[1][0].weight is weight
    assert list(found) == ['0', '1.0', '1.2', '2', '3']


def test_a_linear_with_its_own_forward_is_skipped_with_a_reason():
    model = toy()
    found = census(model)
    assert type(model[2]) is OwnLinear
    assert found['2'].skipped_reason == 'OwnLinear has a forward of its own'
    assert found['2'].weight_bits is None
    assert all(found[n].skipped_reason is None for n in ('0', '1.0', '1.2', '3'))


@pytest.mark.parametrize('build, quant_type, shape', [
    (lambda: wrappers.Linear(4, 3), QuantLinear, (2, 4)),
    (lambda: wrappers.Conv2d(3, 2, 3), QuantConv2d, (1, 3, 5, 5)),
    (lambda: wrappers.ConvTranspose2d(3, 2, 2, 2), QuantConvTranspose2d, (1, 3, 5, 5)),
], ids=['Linear', 'Conv2d', 'ConvTranspose2d'])
def test_mmcv_wrappers_are_swapped(build, quant_type, shape):
    model = nn.Sequential(build())
    x = torch.randn(shape)
    before = model(x)
    census(model)
    assert type(model[0]) is quant_type
    assert torch.equal(model(x), before)


def test_a_layer_without_a_quantized_twin_is_told():
    found = census(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Bilinear(2, 2, 2)))
    assert found['1'].skipped_reason == 'no quantized module for Conv1d'
    assert found['2'].skipped_reason == 'no quantized module for Bilinear'


def test_tables_are_no_layers():
    assert list(census(nn.Sequential(nn.Linear(2, 2), nn.Embedding(5, 2)))) == ['0']


# --- patterns and bits -------------------------------------------------------

def test_first_convolution_keeps_first_last_bits():
    found = census(toy(), weight_bits=3, activation_bits=4)
    assert (found['0'].weight_bits, found['0'].activation_bits) == (8, 8)
    assert (found['1.0'].weight_bits, found['1.0'].activation_bits) == (3, 4)
    found = census(toy(), weight_bits=3, activation_bits=4, first_last_bits=None)
    assert (found['0'].weight_bits, found['0'].activation_bits) == (3, 4)


def test_include_and_exclude():
    found = census(toy(), include=['1.*'], exclude=['*.2'])
    assert found['1.0'].skipped_reason is None
    assert found['0'].skipped_reason == 'no pattern of quant.include matches'
    assert found['1.2'].skipped_reason == "excluded by '*.2'"


def test_the_last_override_wins():
    model = toy()
    found = census(model, weight_bits=4, activation_bits=4, overrides=[
        dict(pattern='1.*', weight_bits=2), dict(pattern='1.2', weight_bits=6, activation_bits=7),
        dict(pattern='0', activation_bits=5)])
    assert (found['1.0'].weight_bits, found['1.0'].activation_bits) == (2, 4)
    assert (found['1.2'].weight_bits, found['1.2'].activation_bits) == (6, 7)
    assert (found['0'].weight_bits, found['0'].activation_bits) == (8, 5)
    assert model[1][2].weight_quantizer.bits == 6 and model[1][2].input_quantizer.bits == 7


@pytest.mark.parametrize('quant, message', [
    (dict(include=['backbone.*']), r"quant\.include: the pattern 'backbone\.\*' matches no layer"),
    (dict(exclude=['1.9']), r"quant\.exclude: the pattern '1\.9' matches no layer"),
    (dict(overrides=[dict(pattern='x', weight_bits=3)]), r"quant\.overrides: the pattern 'x'"),
    (dict(weight_bits=1), r'quant\.weight_bits=1 is out of range; choose an integer from 2 to 8'),
    (dict(weight_bits=9), r'quant\.weight_bits=9'),
    (dict(activation_bits='4'), r"quant\.activation_bits='4'"),
    (dict(activation_bits=4.0), r'quant\.activation_bits=4\.0'),
    (dict(first_last_bits=16), r'quant\.first_last_bits=16'),
    (dict(overrides=[dict(pattern='1.*', weight_bits=12)]),
     r'quant\.overrides\[1\.\*\]\.weight_bits=12'),
    (dict(overrides=[dict(pattern='1.*', bits=4)]), r"quant\.overrides has the key 'bits'"),
    (dict(overrides=[dict(weight_bits=4)]), r'quant\.overrides.*pattern'),
    (dict(rounding='up'), r"quant\.rounding='up' is not a known rounding.*'adaround'"),
    (dict(rounding=dict(type='up')), r"quant\.rounding='up'"),
    (dict(softmax=dict(kind='log10')), r"quant\.softmax\.kind='log10' is not a known quantizer"),
    (dict(rounding=dict(type='adaround', speed=2)), r"quant\.rounding: .*speed"),
    (dict(rounding=None), r"quant\.rounding=None"),
    (dict(softmax=dict(kin='log2')), r'quant\.softmax\.kin is not a known key'),
    (dict(softmax=dict(kind='log2', bits=3)), r'quant\.softmax\.bits is not a known key'),
    (dict(softmax=dict(kind='log2', granularity='row')), r"granularity='row'"),
    (dict(matmul_granularity='row'), r"granularity='row'"),
    (dict(wbits=4), r'quant\.wbits is not a known key; choose of .*weight_bits'),
], ids=lambda v: str(v)[:60] if isinstance(v, dict) else '')
def test_a_mistake_is_one_line_that_names_the_key(quant, message):
    model = nn.Sequential(*toy(), WindowMSA(4, 2, (2, 2)))
    with pytest.raises(UsageError, match=message) as caught:
        census(model, **quant)
    assert '\n' not in str(caught.value)


def test_defaults_are_not_shared():
    first, second = QuantConfig(), QuantConfig()
    first.exclude.append('x')
    first.softmax['bits'] = 3
    assert second.exclude == [] and 'bits' not in second.softmax


# --- the census of a real detector -------------------------------------------

@pytest.fixture(scope='module')
def swin_t():
    """mmdet's own Mask R-CNN Swin-T: (float layers by name, quantized detector)."""
    config = get_config(SWIN_T).model
    config.backbone.init_cfg = None
    config = dict(config)
    arch = config.pop('type')
    detector = MODELS.build(dict(config, type=arch, _scope_='mmdet'))
    layers = {
        name: type(module) for name, module in detector.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
    }
    del detector
    quantized = MODELS.build(dict(
        copy.deepcopy(config), type='pfcr_mm.QuantDetector', arch=arch,
        quant=dict(weight_bits=4, activation_bits=4)))
    return layers, quantized


def test_census_names_every_layer_of_swin_t(swin_t):
    layers, detector = swin_t
    linears = [n for n, kind in layers.items() if issubclass(kind, nn.Linear)]
    assert len(linears) == 55
    assert sum(layers[n] is wrappers.Linear for n in linears) == 24
    records = {r.name: r for r in detector.census}
    assert len(records) == len(detector.census)
    assert layers.keys() <= records.keys()
    for name in layers:
        quantized = isinstance(
            detector.get_submodule(name), (QuantLinear, QuantConv2d, QuantConvTranspose2d))
        assert quantized == (records[name].skipped_reason is None)
    assert all(r.skipped_reason is None for r in detector.census)  # nothing is left out of Swin-T


def test_census_names_every_matmul_of_swin_t(swin_t):
    _, detector = swin_t
    attentions = [n for n, m in detector.named_modules() if isinstance(m, WindowMSA)]
    assert len(attentions) == 12
    records = {r.name: r for r in detector.census}
    for name in attentions:
        for child in ('matmul_qk', 'matmul_av'):
            record = records.pop(f'{name}.{child}')
            assert record.kind == 'Matmul' and record.activation_bits == 4
            assert record.weight_bits is None
    assert not any(r.kind == 'Matmul' for r in records.values())


def test_every_quantizer_of_swin_t_has_a_line_in_the_census(swin_t):
    _, detector = swin_t
    names = {r.name for r in detector.census}
    owners = {n.rpartition('.')[0] for n, _ in quantizers_of(detector)}
    assert owners == names


@pytest.mark.parametrize('bits, kind', [(3, 'log2'), (4, 'log2'), (5, 'adalog'), (8, 'adalog')])
def test_softmax_has_a_grid_that_more_bits_make_finer(bits, kind):
    assert QuantConfig(activation_bits=bits).softmax == dict(kind=kind, granularity='head')
    chosen = QuantConfig(activation_bits=bits, softmax=dict(kind='uniform'))
    assert chosen.softmax['kind'] == 'uniform'
    *_, softmax, _ = QuantConfig(activation_bits=bits).matmul_specs('attn')
    assert (softmax.kind, softmax.bits) == (kind, bits)


def test_ends_of_swin_t_keep_8_bits(swin_t):
    _, detector = swin_t
    eight = [r.name for r in detector.census if r.weight_bits == 8]
    assert sorted(eight) == [
        'backbone.patch_embed.projection', 'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg', 'roi_head.mask_head.conv_logits', 'rpn_head.rpn_cls',
        'rpn_head.rpn_reg']


def test_quantizers_of_swin_attention(swin_t):
    _, detector = swin_t
    attention = detector.backbone.stages[2].blocks[0].attn.w_msa
    qk, av = attention.matmul_qk, attention.matmul_av
    kinds = [q.spec.kind for q in (qk.left_quantizer, qk.right_quantizer, av.left_quantizer,
                                   av.right_quantizer)]
    assert kinds == ['uniform', 'uniform', 'log2', 'uniform']
    assert av.left_quantizer.scale.numel() == attention.num_heads == 12


def test_excluded_matmuls_stay_float(build_quantized, images):
    detector = build_quantized(exclude=['*.matmul_av'])
    names = [n for n, _ in quantizers_of(detector)]
    assert any('.matmul_qk.' in n for n in names) and not any('.matmul_av.' in n for n in names)
    record = next(r for r in detector.census if r.name.endswith('matmul_av'))
    assert record.skipped_reason == "excluded by '*.matmul_av'" and record.activation_bits is None
    detector.extract_feat(images[0][0])


def test_an_override_of_one_matmul(build_quantized):
    detector = build_quantized(
        weight_bits=4, activation_bits=4,
        overrides=[dict(pattern='*.matmul_av', activation_bits=8)])
    attention = detector.backbone.stages[0].blocks[0].attn.w_msa
    assert attention.matmul_av.left_quantizer.bits == 8
    assert attention.matmul_av.right_quantizer.bits == 8
    assert attention.matmul_qk.left_quantizer.bits == 4
    bits = {r.name: r.activation_bits for r in detector.census if 'stages.0.blocks.0' in r.name}
    assert bits['backbone.stages.0.blocks.0.attn.w_msa.matmul_av'] == 8
    assert bits['backbone.stages.0.blocks.0.attn.w_msa.matmul_qk'] == 4


# --- attentions with a forward of their own ----------------------------------

@pytest.mark.parametrize('own', ['window', 'shift'])
def test_a_subclass_of_swins_attention_computes_what_it_did(own):
    torch.manual_seed(0)
    block = SwinBlock(16, 2, 32, window_size=4, shift=True).eval()
    if own == 'window':
        block.attn.w_msa.__class__ = OwnWindowMSA
    else:
        block.attn.__class__ = OwnShiftWindowMSA
    x = torch.randn(2, 6 * 9, 16)
    with torch.no_grad():
        expected = block(x, (6, 9))
        found = census(block, weight_bits=4, activation_bits=4)
        torch.testing.assert_close(block(x, (6, 9)), expected)
    reasons = {'OwnWindowMSA has a forward of its own'} if own == 'window' else {None}
    assert {found[f'attn.w_msa.{name}'].skipped_reason
            for name in ('matmul_qk', 'matmul_av')} == reasons
    # its padding would not move along
    assert [pair[0] for pair in post_norm_pairs(block)] == [block.norm2]


def test_a_neck_with_a_forward_of_its_own_takes_no_folds():
    cfg = get_config(SWIN_T).model
    cfg.backbone.update(init_cfg=None, embed_dims=16, depths=(1, 1, 1, 1), num_heads=(2, ) * 4)
    cfg.neck.in_channels = [16, 32, 64, 128]
    arch = cfg.pop('type')
    detector = MODELS.build(dict(cfg, type='pfcr_mm.QuantDetector', arch=arch, quant={}))
    count = len(post_norm_pairs(detector))

    class OwnFPN(type(detector.neck)):
        def forward(self, inputs):
            return super().forward(inputs) + tuple(inputs[:1])

    detector.neck.__class__ = OwnFPN
    assert len(post_norm_pairs(detector)) == count - 4
