"""Attention's values balanced against the output projection: exact, and less error."""
import copy

import pytest
import torch
from mmdet.models.backbones.swin import WindowMSA
from mmengine.registry import MODELS
from test_reparam import worst
from tiny_classifiers import ARGS, build_classifier, pictures
from torch import nn

from pfcr_mm.analysis.twins import align
from pfcr_mm.errors import UsageError
from pfcr_mm.models import QuantConfig, convert
from pfcr_mm.models.checkpoint import (
    load_quantized,
    manifest_of,
    read_checkpoint,
    save_quantized,
)
from pfcr_mm.models.reparam import balance_values, fold_alike, value_projections
from pfcr_mm.modules import set_quantization
from pfcr_mm.reconstruction import calibrate, harden, observe

KINDS = list(ARGS)
BITS = dict(weight_bits=4, activation_bits=4)


def unequal(kind, **quant):
    """(model whose values have channels of very different size, images)."""
    model = build_classifier(kind, **BITS, **quant)
    generator = torch.Generator().manual_seed(5)
    for attention in [m for m in model.modules() if hasattr(m, 'matmul_av')]:
        width = attention.proj.in_features
        gain = torch.exp(torch.randn(width, generator=generator))
        attention.qkv.weight[-width:].mul_(gain[:, None])
        attention.qkv.bias[-width:].mul_(gain)
    return model, pictures(kind)


def balance(model, x):
    """Balance by what `proj` is given for the images `x`."""
    names = {module: name for name, module in model.named_modules()}
    with observe(model, 4096) as seen:
        model(x)
    set_quantization(model, False, False)
    return balance_values(model, {
        names[proj]: seen.layers[names[proj]].rows.std(0)
        for _, _, proj in value_projections(model)})


def inputs_of(layers, run):
    """What each layer is given while `run()` runs."""
    seen = [None] * len(layers)

    def keep(k):
        def hook(layer, args):
            seen[k] = args[0]
        return hook

    handles = [layer.register_forward_pre_hook(keep(k)) for k, layer in enumerate(layers)]
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_by_hand():
    """Sizes 1 and 9, mean 5: values are divided by sqrt(1/5) and sqrt(9/5)."""
    attention = WindowMSA(2, 1, (1, 1)).requires_grad_(False)
    root = nn.Sequential(attention)
    convert(root, QuantConfig(**BITS))
    qkv, proj = attention.qkv, attention.proj
    for parameter in (qkv.weight, qkv.bias, proj.bias):
        parameter.copy_(torch.arange(1.0, 1 + parameter.numel()).view_as(parameter))
    proj.weight.copy_(torch.tensor([[5.0, 7.0], [1.0, -1.0]]))
    (name, (ratio, shift)), = balance_values(root, {'0.proj': torch.tensor([1.0, 9.0])}).items()
    low, high = 0.2**0.5, 1.8**0.5
    assert name == '0.proj' and shift.tolist() == [0, 0]
    assert ratio.tolist() == attention.value_ratio.tolist() == pytest.approx([low, high])
    assert qkv.weight[:4].flatten().tolist() == list(range(1, 9))  # q and k stay
    assert qkv.bias[:4].tolist() == [1, 2, 3, 4]
    assert qkv.weight[4:].flatten().tolist() == pytest.approx(
        [9 / low, 10 / low, 11 / high, 12 / high])
    assert qkv.bias[4:].tolist() == pytest.approx([5 / low, 6 / high])
    assert proj.weight.flatten().tolist() == pytest.approx([5 * low, 7 * high, low, -high])
    assert proj.bias.tolist() == [1, 2]


@pytest.mark.parametrize('kind', KINDS)
def test_exact_in_double(kind):
    model, x = unequal(kind)
    model, x = model.double(), x.double()
    expected = model(x)
    assert len(balance(model, x)) == len(value_projections(model)) > 1
    assert worst([model(x)], [expected]) < 1e-10


@pytest.mark.parametrize('kind', KINDS)
def test_proj_reads_its_old_input_scaled(kind):
    """In padded windows too (Swin)."""
    model, x = unequal(kind)
    model, x = model.double(), x.double()
    found = value_projections(model)
    before = inputs_of([proj for *_, proj in found], lambda: model(x))
    balance(model, x)
    after = inputs_of([proj for *_, proj in found], lambda: model(x))
    for (attention, *_), old, new in zip(found, before, after):
        torch.testing.assert_close(new, old / attention.value_ratio)
        spread = [t.flatten(0, -2).std(0) for t in (old, new)]
        spread = [(s.max() / s.min()).item() for s in spread]
        assert spread[1] == pytest.approx(spread[0]**0.5, rel=0.2)


def test_a_channel_that_is_always_zero_is_harmless():
    model, x = unequal('vit')
    for _, qkv, _ in value_projections(model):
        qkv.weight[-1].zero_()
        qkv.bias[-1].zero_()
    expected = model(x)
    balance(model, x)
    assert worst([model(x)], [expected]) < 1e-4


def test_an_attention_whose_output_is_constant_stays():
    model, x = unequal('vit')
    _, qkv, _ = value_projections(model)[0]
    for parameter in (qkv.weight, qkv.bias):
        parameter[-len(parameter) // 3:].zero_()
    expected = model(x)
    assert len(balance(model, x)) == 3
    assert worst([model(x)], [expected]) < 1e-5


def attention_errors(kind, method, **quant):
    """Squared error of each attention's output for float inputs, everything quantized."""
    model, x = unequal(kind, **quant)
    attentions = [m for m in model.modules() if hasattr(m, 'matmul_av')]
    given = inputs_of(attentions, lambda: model(x))
    expected = [attention(y) for attention, y in zip(attentions, given)]
    balance(model, x)
    with observe(model, 256) as seen:
        model(x)
    calibrate(model, seen, method)
    set_quantization(model, True, True)
    return [(attention(y) - z).square().mean().item()
            for attention, y, z in zip(attentions, given, expected)]


@pytest.mark.parametrize('method', ['mse', 'output'])
@pytest.mark.parametrize('kind', KINDS)
def test_less_error_where_channels_are_unequal(kind, method):
    ours, plain = (attention_errors(kind, method, balance_values=on) for on in (True, False))
    assert sum(ours) < 0.9 * sum(plain)


def test_switched_off():
    model, x = unequal('vit', balance_values=False)
    assert value_projections(model) == [] and balance(model, x) == {}
    assert not any('value_' in key for key in model.state_dict())


@pytest.mark.parametrize('excluded, served', [
    ('*.attn.proj', 0), ('*.attn.qkv', 4), ('*.matmul_av', 4)])
def test_what_is_not_quantized(excluded, served):
    """A float `proj` gains nothing; a float qkv or product does not hinder."""
    model, x = unequal('vit', exclude=[excluded])
    expected = model(x)
    assert len(balance(model, x)) == served
    assert worst([model(x)], [expected]) < 1e-5


def test_without_biases():
    args = dict(ARGS['vit'], timm_args=dict(
        ARGS['vit']['timm_args'], qkv_bias=False, proj_bias=False))
    model = MODELS.build(dict(
        type='pfcr_mm.QuantDetector', arch='pfcr_mm.TimmClassifier', quant=BITS, **args))
    model.requires_grad_(False)
    x = pictures('vit')
    expected = model.eval()(x)
    assert len(balance(model, x)) == 4
    assert worst([model(x)], [expected]) < 1e-5


def test_a_twin_is_scaled_alike():
    model, x = unequal('swin')
    twin = copy.deepcopy(model)
    fold_alike(twin, balance(model, x))
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


@pytest.fixture(scope='module', params=['vit', 'swin'])
def saved(request, tmp_path_factory):
    """(kind, hardened model, images, path of its checkpoint, balanced float model)."""
    kind = request.param
    model, x = unequal(kind)
    balance(model, x)
    floating = copy.deepcopy(model)
    with observe(model, 256) as seen:
        model(x)
    calibrate(model, seen, 'mse')
    set_quantization(model, True, True)
    harden(model)
    path = str(tmp_path_factory.mktemp(kind) / 'quantized.pth')
    save_quantized(model, path, {})
    return kind, model, x, path, floating


def test_a_checkpoint_holds_the_balance(saved):
    kind, model, x, path, _ = saved
    fresh = build_classifier(kind, seed=1, **BITS)
    load_quantized(fresh, read_checkpoint(path), path)
    assert torch.equal(fresh(x), model(x))
    for (own, *_), (other, *_) in zip(value_projections(fresh), value_projections(model)):
        assert torch.equal(own.value_ratio, other.value_ratio)
        assert (own.value_ratio - 1).abs().max() > 0.1


def test_a_checkpoint_of_the_other_kind_is_refused(saved):
    kind, *_, path, _ = saved
    with pytest.raises(UsageError, match=r'quant\.balance_values=True, the config says False'):
        load_quantized(
            build_classifier(kind, **BITS, balance_values=False), read_checkpoint(path), path)


def test_a_file_that_is_older_than_the_key(saved, tmp_path):
    """It was made without the balance, and loads with the config that says so."""
    model, _ = unequal('vit', balance_values=False)
    with observe(model, 256) as seen:
        model(pictures('vit'))
    calibrate(model, seen, 'mse')
    set_quantization(model, True, True)
    harden(model)
    path = str(tmp_path / 'old.pth')
    save_quantized(model, path, {})
    checkpoint = read_checkpoint(path)
    del manifest_of(checkpoint)['quant']['balance_values']
    fresh = build_classifier('vit', seed=1, **BITS, balance_values=False)
    load_quantized(fresh, checkpoint, path)
    assert torch.equal(fresh(pictures('vit')), model(pictures('vit')))
    with pytest.raises(UsageError, match=r'quant\.balance_values=False, the config says True'):
        load_quantized(build_classifier('vit', **BITS), checkpoint, path)


def test_a_twin_of_a_loaded_checkpoint_is_scaled_alike(saved):
    kind, _, x, path, expected = saved
    loaded = build_classifier(kind, seed=1, **BITS)
    load_quantized(loaded, read_checkpoint(path), path)
    twin, _ = unequal(kind)
    before = twin(x)
    for _ in range(2):  # what is scaled already is not scaled again
        align(twin, loaded)
        assert worst([twin(x)], [before]) < 1e-5
        for own, other in zip(value_projections(twin), value_projections(expected)):
            for ours, theirs in zip(own[1:], other[1:]):
                assert worst([ours.weight], [theirs.weight]) < 1e-4
                assert worst([ours.bias], [theirs.bias]) < 1e-4
