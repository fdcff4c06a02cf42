"""Quantized Linear and convolutions: float behaviour, sharing, rows, hardening, packing."""
import copy

import pytest
import torch
from torch import nn

from pfcr_mm.errors import UsageError
from pfcr_mm.modules import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    quantizers_of,
    set_quantization,
)
from pfcr_mm.quantizers import search

LAYERS = {
    'linear': (QuantLinear, lambda: nn.Linear(6, 5), (2, 7, 6)),
    'linear-no-bias': (QuantLinear, lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    'conv': (QuantConv2d, lambda: nn.Conv2d(3, 4, 3), (2, 3, 9, 8)),
    'conv-padded': (QuantConv2d, lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 9, 8)),
    'conv-strided': (QuantConv2d, lambda: nn.Conv2d(3, 4, 4, stride=(4, 3)), (2, 3, 16, 17)),
    'conv-dilated': (
        QuantConv2d, lambda: nn.Conv2d(3, 4, (3, 2), 2, padding=(2, 1), dilation=(2, 3)),
        (2, 3, 11, 12)),
    'conv-same': (QuantConv2d, lambda: nn.Conv2d(3, 4, (2, 3), padding='same'), (1, 3, 6, 5)),
    'conv-reflect': (
        QuantConv2d, lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode='reflect'),
        (1, 3, 6, 7)),
    'transpose': (QuantConvTranspose2d, lambda: nn.ConvTranspose2d(3, 4, 2, 2), (2, 3, 5, 6)),
    'transpose-overlapping': (
        QuantConvTranspose2d,
        lambda: nn.ConvTranspose2d(3, 4, 3, 2, padding=1, output_padding=1), (2, 3, 5, 6)),
    'conv-grouped': (QuantConv2d, lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
}
EVERY = pytest.mark.parametrize('name', LAYERS)


def make(name, weight_bits=4, activation_bits=4, **kwargs):
    quant_type, build, shape = LAYERS[name]
    torch.manual_seed(3)
    layer = build().requires_grad_(False)
    x = torch.randn(shape) + 0.3
    return layer, quant_type.from_float(layer, weight_bits, activation_bits, **kwargs), x


def make_calibrated(name, weight_bits=4, activation_bits=4, **kwargs):
    _, layer, x = make(name, weight_bits, activation_bits, **kwargs)
    quantizer = layer.weight_quantizer
    rows = layer.weight.movedim(layer.weight_axis, 0).flatten(1)
    quantizer.set_scale(*search.search_range(rows, quantizer.spec))
    layer.input_quantizer.set_scale(
        *search.search_range(x.view(1, -1), layer.input_quantizer.spec))
    set_quantization(layer, True, True)
    return layer, x


@EVERY
def test_off_is_bit_identical_to_float(name):
    layer, quantized, x = make(name)
    assert torch.equal(quantized(x), layer(x))


@EVERY
def test_same_parameters_names_and_type(name):
    layer, quantized, _ = make(name)
    assert isinstance(quantized, type(layer))
    own = {k: p for k, p in quantized.named_parameters() if '_quantizer.' not in k}
    assert own.keys() == dict(layer.named_parameters()).keys()
    for key, parameter in layer.named_parameters():
        assert own[key] is parameter
    assert quantized.state_dict().keys() == layer.state_dict().keys()


def test_the_float_layer_stays_as_it_was():
    layer, quantized, _ = make('linear')
    assert list(layer._modules) == [] and type(layer) is nn.Linear
    quantized.register_buffer('extra', torch.zeros(1))
    assert 'extra' not in dict(layer.named_buffers())


@EVERY
def test_on_uses_quantized_weight_and_input(name):
    layer, x = make_calibrated(name)
    expected = copy.deepcopy(layer)
    expected.weight.copy_(layer.weight_quantizer(layer.weight))
    set_quantization(expected, False, False)
    out = layer(x)
    assert torch.equal(out, expected(layer.input_quantizer(x)))
    assert not torch.equal(out, expected(x))


@EVERY
def test_weight_scales_run_along_output_channels(name):
    layer, x = make_calibrated(name)
    channels = layer(x).shape[layer.input_axis]
    assert layer.weight_quantizer.scale.shape == (channels, )
    for i in range(channels):
        values = layer.quantized_weight().movedim(layer.weight_axis, 0)[i]
        steps = values / layer.weight_quantizer.scale[i]
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', [n for n in LAYERS if n.startswith(('linear', 'conv'))
                                  and n != 'conv-grouped'])
def test_rows_reproduce_the_output(name):
    """All rows drawn: each row of `input_rows` times `weight_rows` is an output position."""
    layer, quantized, x = make(name)
    generator = torch.Generator().manual_seed(0)
    out = layer(x)
    axis = quantized.input_axis
    positions = out.movedim(axis, -1).flatten(0, -2)
    rows = quantized.input_rows(x, generator, 4000)
    assert rows.shape == (len(positions), quantized.weight_rows().shape[1])
    got = rows @ quantized.weight_rows().t() + (0 if layer.bias is None else layer.bias)
    # positions are drawn at random: each row must be one of the outputs
    distance = torch.cdist(got, positions, compute_mode='donot_use_mm_for_euclid_dist').amin(1)
    assert distance.max() < 1e-4
    assert len(torch.cdist(got, positions).argmin(1).unique()) > len(positions) // 3


def test_rows_of_a_transposed_convolution_reproduce_the_output():
    """Kernel 2, stride 2: a row gives the 2x2 outputs under one input pixel."""
    layer, quantized, x = make('transpose')
    rows = quantized.input_rows(x, torch.Generator(), 4000)
    products = (rows @ quantized.weight_rows().t()).view(2, 5, 6, 4, 2, 2)  # N H W out kh kw
    out = products.permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 10, 12) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(out, layer(x))


def test_a_grouped_convolution_has_no_weight_rows():
    assert make('conv-grouped')[1].weight_rows() is None


@pytest.mark.parametrize('name', ['linear', 'conv-strided', 'transpose'])
def test_rows_are_limited_and_reproducible(name):
    _, quantized, x = make(name)
    first, second = (
        quantized.input_rows(x, torch.Generator().manual_seed(5), 3) for _ in range(2))
    assert first.shape[0] == 3 and torch.equal(first, second)


@EVERY
def test_empty_batch(name):
    layer, x = make_calibrated(name)
    empty = x[:0]
    set_quantization(layer, False, False)
    shape = layer(x).shape
    set_quantization(layer, True, True)
    assert layer(empty).shape == (0, *shape[1:])
    rows = layer.input_rows(empty, torch.Generator(), 10)
    assert rows.shape[0] == 0


@EVERY
@pytest.mark.parametrize('rounding', ['nearest', 'latent', 'adaround'])
def test_harden_keeps_the_function_and_is_idempotent(name, rounding):
    layer, x = make_calibrated(name, rounding=rounding)
    for parameter in layer.rounding.open(layer.weight, layer.weight_quantizer):
        parameter.data.normal_()
    if rounding == 'adaround':
        layer.rounding.close()
    before = layer(x)
    codes = layer.harden()
    assert layer.hardened and torch.equal(codes, codes.round())
    weight = layer.weight.clone()
    torch.testing.assert_close(layer(x), before)
    assert torch.equal(layer.harden(), codes)
    assert torch.equal(layer.weight, weight)
    low, high = layer.weight_quantizer.code_range
    assert codes.min() >= low and codes.max() <= high


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('symmetric', [False, True], ids=['affine', 'symmetric'])
@pytest.mark.parametrize('name', ['linear', 'conv', 'transpose'])
def test_packed_weight_round_trips_through_the_state_dict(name, bits, symmetric):
    layer, x = make_calibrated(name, bits, weight_symmetric=symmetric)
    layer.harden()
    state = layer.state_dict()
    del state['weight']
    state['weight_packed'] = layer.packed_weight()
    assert state['weight_packed'].numel() == -(-layer.weight.numel() * bits // 8)

    _, fresh, _ = make(name, bits, weight_symmetric=symmetric)
    fresh.weight = nn.Parameter(torch.zeros_like(fresh.weight), requires_grad=False)
    fresh.load_state_dict(state)  # strict
    assert fresh.hardened and torch.equal(fresh.weight, layer.weight)
    assert torch.equal(fresh(x), layer(x))


def test_packed_weight_of_other_bits_is_refused():
    layer, _ = make_calibrated('linear', 4)
    layer.harden()
    state = {k: v for k, v in layer.state_dict().items() if k != 'weight'}
    state['weight_packed'] = layer.packed_weight()
    with pytest.raises(UsageError, match=r'weight_packed does not fit.*3 bits.*\(5, 6\)'):
        make('linear', 3)[1].load_state_dict(state)


def test_float_state_loads_and_leaves_the_quantizers_off():
    layer, quantized, x = make('linear')
    state = {k: torch.randn_like(v) for k, v in layer.state_dict().items()}
    quantized.load_state_dict(state)
    assert not any(q.enabled for _, q in quantizers_of(quantized))
    assert torch.equal(quantized(x), nn.functional.linear(x, state['weight'], state['bias']))


def test_set_quantization_switches_weights_and_activations_apart():
    layer, _ = make_calibrated('linear')
    model = nn.ModuleDict(dict(a=layer, b=make('linear')[1]))  # b is not calibrated
    for weight, activation in [(True, False), (False, True), (False, False), (True, True)]:
        set_quantization(model, weight, activation)
        assert layer.weight_quantizer.enabled == weight
        assert layer.input_quantizer.enabled == activation
        assert not model['b'].weight_quantizer.enabled and not model['b'].input_quantizer.enabled


def test_a_copy_is_independent():
    layer, x = make_calibrated('conv')
    twin = copy.deepcopy(layer)
    before = layer(x)
    twin.weight.mul_(2)
    twin.weight_quantizer.log_scale.add_(1)
    assert torch.equal(layer(x), before) and not torch.equal(twin(x), before)
