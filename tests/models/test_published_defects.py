"""Two switches that bring back what published code does after the fold; for comparison."""
import copy

import pytest
import torch
from test_reparam import scale_channels
from tiny_classifiers import build_classifier, pictures

from pfcr_mm.models import reparameterise
from pfcr_mm.models.checkpoint import load_quantized, read_checkpoint, save_quantized
from pfcr_mm.models.reparam import make_channelwise, post_norm_pairs
from pfcr_mm.modules import set_quantization
from pfcr_mm.quantizers import QuantizerSpec, build_quantizer
from pfcr_mm.quantizers import functional as F
from pfcr_mm.reconstruction import calibrate, harden, observe


def folded(kind, **quant):
    """(model whose norms are folded, its output before, images); quantizers off."""
    model = scale_channels(
        build_classifier(kind, weight_bits=4, activation_bits=4, **quant))
    x = pictures(kind)
    expected = model(x)
    make_channelwise(model)
    with observe(model, 256) as seen:
        model(x)
    calibrate(model, seen, 'mse')
    reparameterise(model)
    with observe(model, 256) as seen:
        model(x)
    calibrate(model, seen, 'mse', activations=False)
    set_quantization(model, False, False)
    return model, expected, x


def test_padding_that_stays_at_zero_is_wrong_where_windows_are_padded():
    model, expected, x = folded('swin', move_padding=False)
    assert all(b.pad_value.abs().max() == 0 for s in model.backbone.layers for b in s.blocks)
    assert ((model(x) - expected).abs().max() / expected.abs().max()).item() > 1e-3


def test_zero_points_between_integers():
    model, expected, x = folded('vit', integer_zero_point=False)
    assert ((model(x) - expected).abs().max() / expected.abs().max()).item() < 1e-5
    zeros = torch.cat([layer.input_quantizer.zero_point for _, layer, _ in post_norm_pairs(model)])
    assert (zeros != zeros.round()).any()


def test_they_survive_in_a_checkpoint(tmp_path):
    quant = dict(weight_bits=4, activation_bits=4, integer_zero_point=False)
    model, _, x = folded('vit', integer_zero_point=False)
    set_quantization(model, True, True)
    harden(model)
    path = str(tmp_path / 'quantized.pth')
    save_quantized(model, path, {})
    fresh = build_classifier('vit', seed=1, **quant)
    load_quantized(fresh, read_checkpoint(path), path)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize('zero_point, levels', [(5.0, 16), (5.4, 17)])
def test_they_cost_honesty(zero_point, levels):
    quantizer = build_quantizer(QuantizerSpec(bits=4, integer_zero_point=False))
    quantizer.set_scale(torch.tensor([0.1]), torch.tensor([zero_point]))
    quantizer.enabled = True
    assert len(quantizer(torch.linspace(-3, 3, 5001)).unique()) == levels


def test_at_whole_zero_points_both_ways_are_one():
    x = torch.randn(200)
    grads, values = [], []
    for function in (F.UniformFakeQuantize.apply, F.fractional_fake_quantize):
        inputs = copy.deepcopy(x).requires_grad_()
        scale = torch.tensor([0.15], requires_grad=True)
        y = function(inputs, scale, torch.tensor([6.0]), 0, 15)
        (y * torch.arange(200)).sum().backward()
        values.append(y.detach())
        grads.append((inputs.grad, scale.grad))
    assert torch.allclose(*values, atol=1e-6)
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-6)
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-4)
