"""Moments of layers' inputs, and weights fitted to them."""
import copy

import pytest
import torch
from tiny_classifiers import build_classifier, pictures
from torch import nn
from toy_chains import chain_of, toy

from pfcr_mm.models import part_chains
from pfcr_mm.models.chain import Chain, Leaf
from pfcr_mm.modules import QuantConvTranspose2d, QuantLayer, QuantLinear, set_quantization
from pfcr_mm.quantizers import search
from pfcr_mm.reconstruction import (
    MomentObserver,
    calibrate,
    class_tokens,
    compensate_weights,
    fit_weights,
    not_fitted,
    observe,
    round_weights,
)


def linear(fan_in, rows, bits=4, bias=True, seed=0, x=None):
    """A quantized layer, its weight random; its input calibrated on `x`, quantizers off."""
    torch.manual_seed(seed)
    layer = QuantLinear.from_float(nn.Linear(fan_in, rows, bias=bias), bits, bits)
    layer.requires_grad_(False)
    calibrate_on(layer, x)
    return layer


def calibrate_on(layer, x):
    with observe(layer, 4096) as seen:
        layer(x)
    calibrate(layer, seen, 'mse')
    set_quantization(layer, False, False)


def chains(layer, prefix=0):
    leaf = Leaf('all', None, (layer, ))
    return dict(backbone=Chain('backbone', [leaf], -1, prefix_tokens=prefix))


def moments_of(layer, *inputs, prefix=0, activations=False, rows=4096):
    with MomentObserver(layer, chains(layer, prefix), activations, rows) as seen:
        for number, x in enumerate(inputs):
            seen.begin_image(number)
            layer(x)
    return seen


def output_error(layer, floating, x, weights=True):
    set_quantization(layer, weights, True)
    error = (layer(x) - floating(x)).square().mean().item()
    set_quantization(layer, False, False)
    return error


def test_moments_by_hand():
    layer = linear(2, 1, bits=8, x=torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    layer.input_quantizer.set_scale(torch.tensor([2.0]), torch.tensor([0.0]))
    # 1, 2 -> 0 (half to even), 2; 3, 2 -> 4 (1.5 to even), 2
    seen = moments_of(layer, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])).layers['']
    assert seen.weight == seen.rows == 2
    assert seen.mean.tolist() == [2, 2] and seen.quantized_mean.tolist() == [2, 2]
    assert seen.gram.tolist() == [[8, 4], [4, 4]] and seen.cross.tolist() == [[6, 4], [4, 4]]
    mean, quantized_mean, gram, cross = seen.of(layer)
    assert mean.tolist() == quantized_mean.tolist() == [2, 2]
    floor = pytest.approx(6e-5)  # a hundred-thousandth of the mean square
    assert gram.tolist() == [[pytest.approx(4 + 6e-5), 0], [0, floor]]
    assert cross.tolist() == [[pytest.approx(2 + 6e-5), 0], [0, floor]]
    layer.bias = None
    mean, _, gram, _ = seen.of(layer)
    assert mean.tolist() == [0, 0] and gram.tolist() == [[8, 4], [4, 4]]


def test_class_tokens_have_their_share():
    """Whatever the number of patches: of two kinds of rows the means mix as they should."""
    tokens = torch.zeros(3, 50, 2)
    tokens[:, 0, 0] = 10.0
    tokens[:, 1:, 1] = 10.0
    layer = linear(2, 1, bits=8, x=tokens)
    share = class_tokens.PREFIX_SHARE
    for rows in (4096, 20):  # all patches, or a part
        mean = moments_of(layer, tokens, prefix=1, rows=rows).layers[''].mean
        assert mean.tolist() == pytest.approx([10 * share, 10 * (1 - share)], rel=1e-5)
    mean = moments_of(layer, tokens).layers[''].mean
    assert mean.tolist() == pytest.approx([10 / 50, 10 * 49 / 50], rel=1e-5)


def test_a_vit_says_which_tokens_its_result_is_read_from():
    assert part_chains(build_classifier('vit'))[0]['backbone'].prefix_tokens == 1
    assert part_chains(build_classifier('swin'))[0]['backbone'].prefix_tokens == 0


@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
def test_weights_make_up_for_quantized_inputs(bias):
    x = torch.randn(4096, 16) @ torch.randn(16, 16) + 1
    layer = linear(16, 24, bits=3, bias=bias, x=x[:2048])
    floating = copy.deepcopy(layer)
    before = output_error(layer, floating, x[2048:], weights=False)
    compensate_weights(layer, moments_of(layer, x[:2048]), 0.01)
    assert output_error(layer, floating, x[2048:], weights=False) < 0.9 * before
    assert not layer.weight_quantizer.calibrated  # of another weight


@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
def test_rounding_makes_up_for_itself(bias):
    x = torch.randn(4096, 16) @ torch.randn(16, 16) + 1
    layer = linear(16, 24, bits=3, bias=bias, x=x[:2048])
    quantized = copy.deepcopy(layer)
    quantized.weight_quantizer.calibrated = False
    set_quantization(quantized, False, True)

    def error():
        """Of the weight's quantization alone, under the quantized input."""
        set_quantization(layer, True, True)
        return (layer(x[2048:]) - quantized(x[2048:])).square().mean().item()

    before = error()
    round_weights(layer, moments_of(layer, x[:2048], activations=True))
    assert error() < 0.7 * before
    assert layer.weight_quantizer.calibrated


def test_a_transposed_convolution():
    """Taps share a bias, and rows are out-channel major."""
    x = torch.randn(8, 6, 5, 5).mul(torch.linspace(0.2, 2, 6).view(1, 6, 1, 1)) @ torch.randn(5, 5)
    layer = QuantConvTranspose2d.from_float(nn.ConvTranspose2d(6, 4, 2, stride=2), 3, 3)
    layer.requires_grad_(False)
    calibrate_on(layer, x)
    floating = copy.deepcopy(layer)
    rows = layer.weight_rows()
    layer.set_weight_rows(rows.clone())
    assert torch.equal(layer.weight, floating.weight)
    before = output_error(layer, floating, x)
    compensate_weights(layer, moments_of(layer, x), 0.01)
    rows = layer.weight.movedim(1, 0).flatten(1)
    layer.weight_quantizer.set_scale(*search.search_range(rows, layer.weight_quantizer.spec))
    round_weights(layer, moments_of(layer, x, activations=True))
    assert output_error(layer, floating, x) < 0.95 * before


def test_what_cannot_be_fitted_stays_and_says_why(monkeypatch):
    x = torch.randn(128, 16)
    layer = linear(16, 8, x=x)
    before = layer.weight.clone()
    assert not_fitted(layer, moments_of(layer, x)) == {}
    for few in (0, 127):
        seen = moments_of(layer, x[:few])
        assert not_fitted(layer, seen) == {'': f'{few} rows, fewer than 8 x fan-in 16'}
        compensate_weights(layer, seen, 0.01)
        round_weights(layer, seen)
    monkeypatch.setattr(fit_weights, 'MAX_FAN_IN', 15)
    seen = moments_of(layer, x)
    assert not_fitted(layer, seen) == {'': 'fan-in 16 above 15'}
    compensate_weights(layer, seen, 0.01)
    round_weights(layer, seen)
    assert torch.equal(layer.weight, before) and layer.weight_quantizer.calibrated


@pytest.mark.parametrize('spread', [0.0, 1e-3, 0.01])
def test_rows_that_are_nearly_equal_are_harmless(spread):
    """What the sums cannot tell from their rounding must not be fitted."""
    torch.manual_seed(0)
    x = 30 * torch.randn(16) + spread * torch.randn(500, 16)
    layer = linear(16, 8, x=x)
    floating = copy.deepcopy(layer)
    before = output_error(layer, floating, x)
    compensate_weights(layer, moments_of(layer, x), 0.01)
    assert (layer.weight - floating.weight).abs().max() < 0.5 * floating.weight.abs().max()
    rows = layer.weight.flatten(1)
    layer.weight_quantizer.set_scale(*search.search_range(rows, layer.weight_quantizer.spec))
    round_weights(layer, moments_of(layer, x, activations=True))
    assert output_error(layer, floating, x) <= before


def test_a_network_gets_better():
    """The whole toy: both steps, on what is not calibrated on."""
    model, teacher, inputs = toy(bits=4, images=64)
    fresh = [torch.randn(1, 24, 12) for _ in range(32)]

    def error():
        set_quantization(model, True, True)
        return sum((model(x) - teacher(x)).square().mean().item() for x in fresh)

    def moments(activations):
        with MomentObserver(
                model, dict(backbone=chain_of(model)), activations, 4096) as seen:
            for number, x in enumerate(inputs):
                seen.begin_image(number)
                model(x)
        return seen

    before = error()
    compensate_weights(model, moments(False), 0.01)
    with observe(model, activations=True) as seen:
        for x in inputs:
            model(x)
    calibrate(model, seen, 'mse', activations=False)
    between = error()
    round_weights(model, moments(True))
    assert error() < 0.9 * before and error() < between


def test_order_of_images_does_not_matter():
    x = [torch.randn(50, 8) for _ in range(6)]
    layer = linear(8, 4, x=torch.cat(x))

    def gram(order):
        with MomentObserver(layer, chains(layer), False, 20) as seen:
            for number in order:
                seen.begin_image(number)
                layer(x[number])
        return seen.layers[''].gram

    torch.testing.assert_close(gram(range(6)), gram([3, 1, 5, 0, 2, 4]), rtol=1e-7, atol=0)


def test_handles_are_removed_where_a_pass_fails():
    model = build_classifier('vit', weight_bits=4, activation_bits=4)
    with pytest.raises(RuntimeError), MomentObserver(model, part_chains(model)[0], False):
        model(pictures('vit'))
        raise RuntimeError
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, QuantLayer))
