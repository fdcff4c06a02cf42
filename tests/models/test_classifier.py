"""timm's classifiers as models of MMEngine: ViT, DeiT and Swin through one code path."""
import copy
import re

import pytest
import timm
import torch
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from test_reparam import scale_channels
from timm.models.swin_transformer import WindowAttention
from tiny_classifiers import ARGS, CLASSES, build_classifier, float_state, pictures
from torch import nn

from pfcr_mm.errors import UsageError
from pfcr_mm.models import State, part_chains, reparameterise
from pfcr_mm.models.checkpoint import load_float, load_quantized, read_checkpoint, save_quantized
from pfcr_mm.models.reparam import make_channelwise, post_norm_pairs
from pfcr_mm.models.timm_names import preprocessing_of
from pfcr_mm.modules import QuantLayer, quantizers_of, set_quantization
from pfcr_mm.reconstruction import build_schedule, calibrate, harden, observe, traversal_string

KINDS = list(ARGS)
LEVELS = ['leaf', 'block', 'pair', 'quad', 'stage', 'backbone']


def timm_model(kind, state):
    """timm's own model of the same weights."""
    args = ARGS[kind]
    model = timm.create_model(
        args['model_name'], num_classes=CLASSES, **args['timm_args']).eval().requires_grad_(False)
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra and all(name.endswith('relative_position_index') for name in missing)
    return model


def calibrated(model, kind, method='mse', on=True):
    with observe(model, 256) as seen:
        model(pictures(kind))
    calibrate(model, seen, method)
    set_quantization(model, on, on)
    return model


@pytest.fixture(scope='module', params=KINDS)
def pair(request):
    """(kind, calibrated W4A4 model with quantizers on)."""
    model = build_classifier(request.param, weight_bits=4, activation_bits=4)
    return request.param, calibrated(model, request.param)


# --- off is float -------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
def test_off_is_timms(kind):
    model = build_classifier(kind)
    expected = timm_model(kind, float_state(model))
    x = pictures(kind)
    assert (model(x) - expected(x)).abs().max() < 1e-4
    for module in expected.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False
    assert torch.equal(model(x), expected(x))


def test_on_is_not_float_but_near(pair):
    kind, model = pair
    float_model = build_classifier(kind)
    own, expected = model(pictures(kind)), float_model(pictures(kind))
    error = ((own - expected).norm() / expected.norm()).item()
    assert 1e-3 < error < 0.9


def test_modes():
    model = build_classifier('vit')
    x = pictures('vit', 3)
    samples = [BaseDataElement(gt_label=i) for i in (0, 4, 2)]
    found = model(x, samples, mode='predict')
    assert found[1] is samples[1]
    assert torch.allclose(found[1].pred_scores, model(x).softmax(-1)[1])
    loss = model(x, samples, mode='loss')['loss']
    assert torch.allclose(loss, -torch.log_softmax(model(x), -1)[[0, 1, 2], [0, 4, 2]].mean())
    data = model.data_preprocessor(dict(inputs=list(x), data_samples=samples))
    assert torch.equal(data['inputs'], x) and model.input_size == (64, 64)


def test_any_name_of_timms_builds():
    for name, layers in (('vit_small_patch16_224', 49), ('deit_base_patch16_224', 49),
                         ('swin_small_patch4_window7_224', 100)):
        with torch.device('meta'):
            model = MODELS.build(dict(
                type='pfcr_mm.QuantDetector', arch='pfcr_mm.TimmClassifier', model_name=name,
                quant=dict(weight_bits=3, activation_bits=3)))
        linears = [m for m in model.modules() if isinstance(m, QuantLayer)]
        assert len(linears) == layers + 1
        assert list(part_chains(model)[0]) == ['backbone'] and part_chains(model)[1] == {}


# --- census -------------------------------------------------------------------

def test_census_names_every_layer_and_matmul(pair):
    kind, model = pair
    expected = timm_model(kind, float_state(model))
    layers = {f'backbone.{n}' for n, m in expected.named_modules()
              if isinstance(m, (nn.Linear, nn.Conv2d))}
    attentions = {f'backbone.{n}' for n, m in expected.named_modules()
                  if isinstance(m, (timm.layers.Attention, WindowAttention))}
    matmuls = {f'{a}.{m}' for a in attentions for m in ('matmul_qk', 'matmul_av')}
    records = {r.name: r for r in model.census}
    assert len(attentions) == dict(vit=4, deit=2, swin=4)[kind]
    assert records.keys() == layers | matmuls and len(records) == len(model.census)
    assert all(r.skipped_reason is None for r in model.census)
    assert {n.rpartition('.')[0] for n, _ in quantizers_of(model)} == layers | matmuls


def test_first_and_last_layers_have_eight_bits(pair):
    kind, model = pair
    eight = {r.name for r in model.census if r.weight_bits == 8}
    heads = dict(vit={'head'}, deit={'head', 'head_dist'}, swin={'head.fc'})[kind]
    assert eight == {'backbone.patch_embed.proj', *(f'backbone.{h}' for h in heads)}
    assert {r.weight_bits for r in model.census} == {8, 4, None}


# --- reparameterisation -------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
def test_folded_is_float(kind):
    model = scale_channels(build_classifier(kind, weight_bits=4, activation_bits=4))
    x = pictures(kind)
    expected = model(x)
    make_channelwise(model)
    calibrated(model, kind, on=False)
    pairs = post_norm_pairs(model)
    assert len(pairs) == dict(vit=8, deit=4, swin=9)[kind]
    assert len(reparameterise(model)) == len(pairs)
    assert ((model(x) - expected).abs().max() / expected.abs().max()).item() < 1e-5
    if kind == 'swin':  # maps are padded: what padding stands for has moved
        model.backbone.layers[0].blocks[0].pad_value.zero_()
        assert ((model(x) - expected).abs().max() / expected.abs().max()).item() > 1e-3


def test_padded_queries_are_left_out_of_statistics():
    model = build_classifier('swin')
    model(pictures('swin'))
    block = model.backbone.layers[0].blocks[0]  # 18x18 tokens in windows of 7: 3x3 windows
    valid = block.attn.matmul_av.left_quantizer.valid_rows
    assert valid.shape == (9, 49) and valid.sum() == 18 * 18
    assert valid[0].all() and valid[8].sum() == 16


# --- chain --------------------------------------------------------------------

def test_the_chain_computes_the_model(pair):
    kind, model = pair
    chain = part_chains(model)[0]['backbone']
    state, side = chain.run(State((pictures(kind), )))
    assert side == () and torch.equal(state.tensors[0], model(pictures(kind)))
    assert chain.gives == 'logits'


@pytest.mark.parametrize('kind, expected', [
    ('vit', 'E1 A1 M1 B1 A2 M2 B2 P1 A3 M3 B3 A4 M4 B4 P2 Q1 L1 ALL'),
    ('swin', 'E1 A1 M1 B1 A2 M2 B2 P1 S1 D1 A3 M3 B3 A4 M4 B4 P2 S2 L1 ALL')])
def test_traversal(kind, expected):
    chain = part_chains(build_classifier(kind))[0]['backbone']
    assert traversal_string(build_schedule(chain, LEVELS)) == expected


def test_every_parameter_belongs_to_one_leaf(pair):
    kind, model = pair
    chain = part_chains(model)[0]['backbone']
    owned = [id(p) for leaf in chain.leaves for m in leaf.modules for p in m.parameters()]
    assert len(owned) == len(set(owned))
    rest = {n for n, p in model.backbone.named_parameters() if id(p) not in owned}
    assert rest == dict(vit={'pos_embed', 'cls_token'}, swin=set(),
                        deit={'pos_embed', 'cls_token', 'dist_token'})[kind]


def test_gradient_reaches_all_scales_and_weights():
    model = calibrated(build_classifier('swin', weight_bits=4, activation_bits=4), 'swin')
    block = model.backbone.layers[0].blocks[1]
    wanted = {n: q.log_scale for n, q in quantizers_of(block) if 'weight_quantizer' not in n}
    wanted.update({n: m.weight for n, m in block.named_modules() if isinstance(m, QuantLayer)})
    assert len(wanted) == 4 + 4 + 4  # q, k, softmax, v; four inputs; four weights
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    model(pictures('swin')).square().sum().backward()
    for name, parameter in wanted.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# --- checkpoints --------------------------------------------------------------

@pytest.mark.parametrize('wrapped', [False, True], ids=['state dict', 'in model'])
def test_weights_in_timms_naming_load(pair, wrapped, tmp_path):
    kind, model = pair
    path = str(tmp_path / 'float.pth')
    state = float_state(model)
    torch.save(dict(model=state) if wrapped else state, path)
    fresh = build_classifier(kind, seed=1)
    load_float(fresh, read_checkpoint(path), path)
    assert all(torch.equal(fresh.state_dict()[f'backbone.{k}'], v) for k, v in state.items())


def test_weights_in_microsofts_naming_load(tmp_path):
    """Merging stands at the end of a stage there, and the head is one layer."""
    model = build_classifier('swin')
    state = {}
    for key, value in float_state(model).items():
        key = re.sub(r'layers\.1\.downsample', 'layers.0.downsample', key)
        state[key.replace('head.fc.', 'head.')] = value
    path = str(tmp_path / 'official.pth')
    torch.save(dict(model=state), path)
    fresh = build_classifier('swin', seed=1)
    load_float(fresh, read_checkpoint(path), path)
    assert torch.equal(fresh(pictures('swin')), model(pictures('swin')))


def test_weights_of_another_model_are_refused(tmp_path):
    state = float_state(build_classifier('vit'))
    state['head.weight'] = torch.zeros(7, 32)
    path = str(tmp_path / 'float.pth')
    torch.save(state, path)
    with pytest.raises(UsageError, match='head.weight'):
        load_float(build_classifier('vit'), read_checkpoint(path), path)


def test_save_and_load_keep_every_bit_of_the_function(pair, tmp_path):
    kind, model = pair
    model = copy.deepcopy(model)
    harden(model)
    path = str(tmp_path / 'quantized.pth')
    save_quantized(model, path, {})
    fresh = build_classifier(kind, seed=1, weight_bits=4, activation_bits=4)
    load_quantized(fresh, read_checkpoint(path), path)
    assert torch.equal(fresh(pictures(kind)), model(pictures(kind)))


def test_weights_by_name(monkeypatch):
    model = timm_model('vit', float_state(build_classifier('vit')))
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: model)
    found = read_checkpoint('timm://vit_tiny_patch16_224')['state_dict']
    assert torch.equal(found['head.weight'], model.head.weight)

    def offline(name, pretrained):
        raise OSError('no network\nand more')

    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(UsageError, match=r'timm://vit_tiny.*\(no network\).*as CHECKPOINT'):
        read_checkpoint('timm://vit_tiny_patch16_224')


# --- bad input ----------------------------------------------------------------

@pytest.mark.parametrize('name, words', [
    ('resnet50', "'resnet50' is no plain transformer"),
    ('swinv2_tiny_window8_256', 'is no plain transformer'),
    ('vit_tinny_patch16_224', "is not a model of timm .*'vit_tiny_patch16_224'"),
    ('vit_tiny_patch16_224.nobody', 'is not a model of timm'),
    (None, 'is not a model of timm'),
], ids=str)
def test_no_such_model(name, words):
    with pytest.raises(UsageError, match=words):
        MODELS.build(dict(type='pfcr_mm.QuantDetector', arch='pfcr_mm.TimmClassifier', quant={},
                          model_name=name))


def test_arguments_that_do_not_fit():
    with pytest.raises(UsageError, match='model.timm_args={.*} does not fit vit_tiny'):
        MODELS.build(dict(type='pfcr_mm.TimmClassifier', model_name='vit_tiny_patch16_224',
                          timm_args=dict(no_such_key=1)))


def test_preprocessing_is_timms():
    found = preprocessing_of('vit_tiny_patch16_224.augreg_in21k_ft_in1k')
    assert (found['input_size'], found['interpolation'], found['crop_pct']) == (
        (3, 224, 224), 'bicubic', 0.9)
    assert found['mean'] == found['std'] == (0.5, 0.5, 0.5)
    assert preprocessing_of('swin_tiny_patch4_window7_224')['mean'] == (0.485, 0.456, 0.406)
    assert preprocessing_of('vit_tiny_patch16_224', dict(img_size=64))['input_size'] == (3, 64, 64)
