"""Class tokens with quantizers of their own: where they are, the fold, checkpoints, fits."""
import copy

import pytest
import torch
from test_reparam import scale_channels
from tiny_classifiers import build_classifier, pictures

from pfcr_mm.errors import UsageError
from pfcr_mm.models import part_chains, reparameterise
from pfcr_mm.models.checkpoint import load_quantized, read_checkpoint, save_quantized
from pfcr_mm.models.manifest import build_manifest
from pfcr_mm.models.reparam import make_channelwise, post_norm_pairs
from pfcr_mm.modules import QuantLinear, set_quantization
from pfcr_mm.quantizers import TokenQuantizer
from pfcr_mm.reconstruction import (
    MomentObserver,
    TokenRows,
    calibrate,
    calibrate_tokens,
    harden,
    observe,
)

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


def test_class_tokens_have_less_noise_patches_the_same():
    own, shared = calibrated(class_tokens='own'), calibrated(class_tokens='shared')
    inputs = {}
    handles = [m.register_forward_pre_hook(
        lambda layer, args, name=name: inputs.__setitem__(name, args[0]))
        for name, m in shared.named_modules() if isinstance(m, QuantLinear)]
    set_quantization(shared, False, False)
    shared(pictures('vit', 16))
    for handle in handles:
        handle.remove()
    set_quantization(shared, False, True)
    better = 0
    for name, x in inputs.items():
        if '.blocks.' not in name:
            continue
        layer, other = own.get_submodule(name), shared.get_submodule(name)
        assert layer.token_quantizer.enabled is layer.token_quantizer.calibrated
        found = layer.quantized_input(x)
        assert torch.equal(found[:, 1:], layer.input_quantizer(x[:, 1:]))
        errors = [((m.quantized_input(x) - x)[:, :1] @ m.weight.t()).square().mean()
                  for m in (layer, other)]
        assert errors[0] <= 1.001 * ((layer.input_quantizer(x) - x)[:, :1]
                                     @ layer.weight.t()).square().mean()
        better += bool(errors[0] < 0.5 * errors[1])
    assert better >= 8  # of 16


def test_the_fold_keeps_codes_of_class_tokens():
    model = calibrated(channelwise=True, class_tokens='own')
    model.double()
    for _, layer, _ in post_norm_pairs(model):  # channels learn: their widths are not the first
        layer.input_quantizer.log_scale.add_(
            0.2 * torch.randn(layer.input_quantizer.log_scale.shape, dtype=torch.float64,
                              generator=torch.Generator().manual_seed(1)))
    x = pictures('vit').double()
    before = model(x)
    assert len(reparameterise(model)) == 8
    assert all(layer.channel_widths() is None for _, layer, _ in post_norm_pairs(model))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)


def test_fits_of_weights_see_what_the_layer_sees():
    model = calibrated(class_tokens='own')
    chains = part_chains(model)[0]
    with MomentObserver(model, chains, activations=False, rows=10**6) as seen:
        model(pictures('vit', 4))
    name = 'backbone.blocks.2.mlp.fc1'
    layer, x = model.get_submodule(name), None
    assert layer.token_quantizer.calibrated

    def keep(layer, args):
        nonlocal x
        x = args[0]

    handle = layer.register_forward_pre_hook(keep)
    model(pictures('vit', 4))
    handle.remove()
    set_quantization(model, False, True)
    quantized = layer.quantized_input(x).double()
    first, others = quantized[:, :1].flatten(0, 1), quantized[:, 1:].flatten(0, 1)
    mean = 0.1 * first.mean(0) + 0.9 * others.mean(0)  # class tokens count for a tenth
    torch.testing.assert_close(seen.layers[name].quantized_mean, mean, rtol=1e-4, atol=1e-5)


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


def test_copies_are_apart():
    model = calibrated(class_tokens='own')
    twin = copy.deepcopy(model)
    layer = twin.backbone.blocks[0].mlp.fc1
    layer.token_quantizer.centre.add_(1)
    assert not torch.equal(layer.token_quantizer.centre,
                           model.backbone.blocks[0].mlp.fc1.token_quantizer.centre)
