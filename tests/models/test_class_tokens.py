"""Class tokens with quantizers of their own: where they are, the fold, checkpoints, fits."""
import copy

import pytest
import torch
from test_reparam import scale_channels
from tiny_classifiers import build_classifier, pictures

from pfcr_mm.errors import UsageError
from pfcr_mm.models import part_chains, reparameterise
from pfcr_mm.models.checkpoint import load_quantized, read_checkpoint, save_quantized
from pfcr_mm.models.manifest import build_manifest, layer_entries
from pfcr_mm.models.reparam import make_channelwise, post_norm_pairs
from pfcr_mm.modules import QuantLinear, set_quantization
from pfcr_mm.quantizers import TokenQuantizer
from pfcr_mm.reconstruction import (
    MomentObserver,
    TokenRows,
    UnitConfig,
    calibrate,
    calibrate_tokens,
    harden,
    observe,
)
from pfcr_mm.reconstruction.learned_parameters import LearnedParameters

BITS = dict(weight_bits=4, activation_bits=4)


def calibrated(kind='vit', channelwise=False, **quant):
    """A tiny classifier with scales, its activation quantizers on."""
    model = scale_channels(build_classifier(kind, **BITS, **quant))
    if channelwise:
        make_channelwise(model)
    tokens = TokenRows(model)
    with tokens, observe(model, 256) as seen:
        model(pictures(kind, 16))
    calibrate(model, seen, 'mse')
    calibrate_tokens(model, tokens.layers)
    set_quantization(model, False, True)
    return model


@pytest.mark.parametrize('kind, depth, tokens', [('vit', 4, 1), ('deit', 2, 2), ('swin', 0, 0)])
def test_linear_layers_of_blocks_have_them(kind, depth, tokens):
    model = build_classifier(kind, **BITS, class_tokens='own')
    found = {name: m.token_quantizer for name, m in model.named_modules()
             if isinstance(m, QuantLinear) and m.token_quantizer is not None}
    assert len(found) == 4 * depth and all('.blocks.' in name for name in found)
    assert all(q.tokens == tokens and q.bits == 4 for q in found.values())


def test_shared_is_what_is_not_asked_for():
    model = build_classifier('vit', **BITS)
    assert not any(isinstance(m, TokenQuantizer) for m in model.modules())
    with pytest.raises(UsageError, match="class_tokens='both' is not known; choose 'own'"):
        build_classifier('vit', **BITS, class_tokens='both')


def inputs_of(model, x):
    """What each linear layer of a block reads, by name."""
    found = {}
    handles = [m.register_forward_pre_hook(
        lambda layer, args, name=name: found.__setitem__(name, args[0]))
        for name, m in model.named_modules() if isinstance(m, QuantLinear) and '.blocks.' in name]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def test_class_tokens_have_less_noise_patches_the_same():
    model = calibrated(class_tokens='own')
    set_quantization(model, False, False)
    inputs = inputs_of(model, pictures('vit', 16))
    set_quantization(model, False, True)
    better = 0
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        own = layer.token_quantizer
        assert own.enabled is own.calibrated
        found = layer(x)
        exact, shared = (torch.nn.functional.linear(q, layer.weight, layer.bias)
                         for q in (x, layer.input_quantizer(x)))
        torch.testing.assert_close(found[:, 1:], shared[:, 1:])
        errors = [(y - exact)[:, 0].square().mean() for y in (found, shared)]
        assert errors[0] <= 1.001 * errors[1]
        better += bool(errors[0] < 0.5 * errors[1])
    assert better >= 8  # of 16


def test_an_error_of_weights_does_not_meet_the_centre():
    model = calibrated(class_tokens='own')
    x = inputs_of(model, pictures('vit', 16))['backbone.blocks.1.attn.qkv']
    layer = model.backbone.blocks[1].attn.qkv
    before = layer(x)
    layer.weight.add_(0.1)
    moved = layer(x) - before
    own = layer.token_quantizer.about_centre(x[:, :1], layer.channel_widths())
    expected = 0.1 * own.sum(-1, keepdim=True).expand(-1, -1, moved.shape[-1])
    torch.testing.assert_close(moved[:, :1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', ['vit', 'deit'])  # one class token, and two
def test_the_fold_keeps_codes_of_class_tokens(kind):
    model = calibrated(kind, channelwise=True, class_tokens='own')
    model.double()
    for _, layer, _ in post_norm_pairs(model):  # channels learn: their widths are not the first
        layer.input_quantizer.log_scale.add_(
            0.2 * torch.randn(layer.input_quantizer.log_scale.shape, dtype=torch.float64,
                              generator=torch.Generator().manual_seed(1)))
    x = pictures(kind).double()
    before = model(x)
    assert len(reparameterise(model)) == 2 * len(model.backbone.blocks)
    assert all(layer.channel_widths() is None for _, layer, _ in post_norm_pairs(model))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)


def test_fits_of_weights_see_what_the_layer_sees():
    model = calibrated(class_tokens='own')
    with MomentObserver(model, part_chains(model)[0], activations=False, rows=10**6) as seen:
        x = inputs_of(model, pictures('vit', 4))
    name = 'backbone.blocks.2.mlp.fc1'
    layer, x, found = model.get_submodule(name), x[name], seen.layers[name]
    assert layer.token_quantizer.calibrated
    set_quantization(model, False, True)
    own = layer.token_quantizer
    first = [(x[:, 0] - own.centre).double(), own.about_centre(x[:, :1])[:, 0].double()]
    others = [rows[:, 1:].flatten(0, 1).double() for rows in (x, layer.input_quantizer(x))]
    mean, quantized_mean, gram, cross = found.of(layer)
    torch.testing.assert_close(mean, others[0].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantized_mean, others[1].mean(0), rtol=1e-4, atol=1e-5)
    others = [rows - rows.mean(0) for rows in others]
    for value, (left, right) in ((gram, (1, 1)), (cross, (0, 1))):  # class tokens are a tenth
        expected = (0.1 * first[left].t() @ first[right] / len(first[0])
                    + 0.9 * others[left].t() @ others[right] / len(others[0]))
        off = value - expected  # and a floor on the diagonal
        assert off.abs().max() < 1e-3 * expected.abs().max()


def test_biases_of_class_tokens_learn():
    model = calibrated(class_tokens='own')
    layer = model.backbone.blocks[0].attn.qkv
    learned = LearnedParameters([layer], UnitConfig(iters=1), 'float')
    with learned:
        assert any(p is layer.token_quantizer.bias for p in learned.parameters)
        assert any(p is layer.token_quantizer.log_scale for p in learned.parameters)


def test_checkpoint_round_trip_and_its_config(tmp_path):
    model = calibrated(class_tokens='own')
    reparameterise(model)
    with observe(model, 256, activations=True) as seen:
        model(pictures('vit', 16))
    calibrate(model, seen, 'mse', activations=False)
    model.backbone.blocks[1].mlp.fc2.token_quantizer.calibrated = False  # shares
    set_quantization(model, True, True)
    model.backbone.blocks[1].mlp.fc2.token_quantizer.enabled = False
    harden(model)
    path = str(tmp_path / 'q.pth')
    save_quantized(model, path, {})
    for file in (path, path.replace('.pth', '.safetensors')):
        twin = build_classifier('vit', seed=5, **BITS, class_tokens='own')
        load_quantized(twin, read_checkpoint(file), file)
        assert torch.equal(twin(pictures('vit')), model(pictures('vit')))
        assert not twin.backbone.blocks[1].mlp.fc2.token_quantizer.enabled
    other = build_classifier('vit', **BITS)
    with pytest.raises(UsageError, match="quant.class_tokens='own', the config says 'shared'"):
        load_quantized(other, read_checkpoint(path), path)


def test_a_layer_that_shares_is_not_called_unreached():
    model = calibrated(class_tokens='own')
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and layer.token_quantizer is not None:
            layer.token_quantizer.calibrated = False
    assert not [e for e in build_manifest(model)['layers'] if e['skipped_reason']]
    choices = [e['class_tokens'] for e in layer_entries(model) if 'class_tokens' in e]
    assert choices == 4 * 4 * ['shared']
    model.backbone.blocks[0].mlp.fc1.token_quantizer.calibrated = True
    assert {e['name'] for e in layer_entries(model) if e.get('class_tokens') == 'own'} == {
        'backbone.blocks.0.mlp.fc1'}


def test_copies_are_apart():
    model = calibrated(class_tokens='own')
    twin = copy.deepcopy(model)
    layer = twin.backbone.blocks[0].mlp.fc1
    layer.token_quantizer.centre.add_(1)
    assert not torch.equal(layer.token_quantizer.centre,
                           model.backbone.blocks[0].mlp.fc1.token_quantizer.centre)
