"""The fold of channel-wise post-LayerNorm scales is exact, padding included."""
import copy

import pytest
import torch
from mmdet.models.layers.transformer.utils import PatchMerging
from tiny_models import calibrated, randomise
from torch import nn

from pfcr_mm.models import reparameterise
from pfcr_mm.models.reparam import fit_channels, fold_alike, make_channelwise, post_norm_pairs
from pfcr_mm.models.swin import QuantShiftWindowMSA
from pfcr_mm.modules import QuantLayer, QuantLinear, set_quantization


def scale_channels(detector):
    """Norms with channels of very different size and sign, as trained networks have them."""
    generator = torch.Generator().manual_seed(4)
    for norm, _, _ in post_norm_pairs(detector):
        norm.weight.mul_(torch.exp(torch.randn(norm.weight.shape, generator=generator)))
        norm.bias.add_(2 * torch.randn(norm.bias.shape, generator=generator))
    return detector


@pytest.fixture(scope='module')
def _channelwise(build_quantized, images):
    detector = scale_channels(build_quantized(weight_bits=4, activation_bits=4))
    for _, layer, _ in post_norm_pairs(detector):
        layer.bias.normal_(0, 0.3)
    make_channelwise(detector)
    return calibrated(detector, images, on=False)


@pytest.fixture()
def channelwise(_channelwise):
    """A detector with calibrated channel-wise post-norm quantizers, off."""
    return copy.deepcopy(_channelwise)


def worst(maps, expected):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(maps, expected))


def test_pairs_of_a_swin_detector(channelwise):
    # attention and MLP of 8 blocks, 3 mergings, 4 maps that go to the neck
    assert len(post_norm_pairs(channelwise)) == 8 * 2 + 3 + 4


@pytest.mark.parametrize('index', range(3), ids=['64x64', '64x96', '96x64'])
def test_folded_agrees_with_float_where_windows_are_padded(channelwise, images, index):
    inputs = images[index][0]
    expected = channelwise.extract_feat(inputs)
    assert len(reparameterise(channelwise)) == 23
    assert worst(channelwise.extract_feat(inputs), expected) < 1e-5


def test_without_moving_pad_value_it_would_not(channelwise, images):
    inputs = images[1][0]
    expected = channelwise.extract_feat(inputs)
    reparameterise(channelwise)
    for module in channelwise.modules():
        if isinstance(module, QuantShiftWindowMSA):
            assert module.pad_value.abs().max() > 0.1
            module.pad_value.zero_()
    assert worst(channelwise.extract_feat(inputs), expected) > 1e-2


def test_exact_in_double(channelwise, images):
    inputs = images[2][0].double()
    channelwise.double()
    expected = channelwise.extract_feat(inputs)
    reparameterise(channelwise)
    assert worst(channelwise.extract_feat(inputs), expected) < 1e-12


def test_per_tensor_codes_equal_channelwise_codes(channelwise, images):
    channelwise.double()
    codes = {}

    def see(name):
        def hook(layer, args):
            codes.setdefault(name, []).append(layer.input_quantizer.encode(args[0]))
        return hook

    layers = [layer for _, layer, _ in post_norm_pairs(channelwise)]
    for k, layer in enumerate(layers):
        layer.register_forward_pre_hook(see(k))
    for inputs, _ in images:
        channelwise.extract_feat(inputs.double())
    before, codes = codes, {}
    reparameterise(channelwise)
    for inputs, _ in images:
        channelwise.extract_feat(inputs.double())
    assert len(before) == len(codes) == 23
    for k, layer in enumerate(layers):
        assert layer.input_quantizer.scale.numel() == 1
        for a, b in zip(before[k], codes[k]):
            assert torch.equal(a, b)


def test_zero_points_stay_integer_codes_and_levels_exact(channelwise):
    reparameterise(channelwise)
    for _, layer, _ in post_norm_pairs(channelwise):
        quantizer = layer.input_quantizer
        zero = quantizer.zero_point
        assert torch.equal(zero, zero.round()) and 0 <= zero <= 15
        quantizer.enabled = True
        reach = 40 * quantizer.scale.item()
        assert quantizer(torch.linspace(-reach, reach, 5001)).unique().numel() == 16


@pytest.mark.parametrize('bits', range(2, 9))
def test_levels_after_folding_at_all_bits(build_quantized, images, bits):
    detector = scale_channels(build_quantized(activation_bits=bits))
    make_channelwise(detector)
    calibrated(detector, images[:1], 'minmax', on=False)
    reparameterise(detector)
    for _, layer, _ in post_norm_pairs(detector):
        quantizer = layer.input_quantizer
        quantizer.enabled = True
        reach = (2**bits + 1) * quantizer.scale.item()
        x = torch.linspace(-reach, reach, 40_001)
        assert quantizer(x).unique().numel() == 2**bits


def test_weight_scales_are_invalid_afterwards(channelwise):
    pairs = post_norm_pairs(channelwise)
    reparameterise(channelwise)
    folded = {id(layer) for _, layer, _ in pairs}
    for module in channelwise.modules():
        if isinstance(module, QuantLayer):
            assert module.weight_quantizer.calibrated == (id(module) not in folded)


def test_a_twin_folded_alike_hands_on_the_same_maps(channelwise, images):
    """Maps between backbone and neck change their meaning, channel by channel."""
    inputs = images[1][0]
    twin = copy.deepcopy(channelwise)
    before, expected = twin.backbone(inputs), twin.extract_feat(inputs)
    fold_alike(twin, reparameterise(channelwise))
    assert worst(twin.extract_feat(inputs), expected) < 1e-5
    assert worst(twin.backbone(inputs), channelwise.backbone(inputs)) < 1e-6
    assert worst(twin.backbone(inputs), before) > 0.1


@pytest.mark.parametrize('extra, count', [(False, 4), ('on_lateral', 4), ('on_input', 3)])
def test_a_map_with_two_readers_is_not_folded(tiny_config, build_quantized, extra, count):
    config = copy.deepcopy(tiny_config)
    config.neck.add_extra_convs = extra
    detector = build_quantized(config)
    laterals = [conv.conv for conv in detector.neck.lateral_convs]
    found = [layer for _, layer, _ in post_norm_pairs(detector) if layer in laterals]
    assert found == laterals[:count]


def test_folding_twice_is_folding_once(channelwise):
    reparameterise(channelwise)
    state = {k: v.clone() for k, v in channelwise.state_dict().items()}
    assert len(reparameterise(channelwise)) == 0
    assert all(torch.equal(v, state[k]) for k, v in channelwise.state_dict().items())


def test_nothing_is_folded_without_calibration(build_quantized):
    detector = build_quantized()
    make_channelwise(detector)
    assert len(reparameterise(detector)) == 0


def test_by_hand():
    """One norm, one linear: r = s / mean s, b = mean s (z~ - z)."""
    norm, layer = nn.LayerNorm(2), QuantLinear.from_float(nn.Linear(2, 1), 8, 4)
    merging = PatchMerging(2, 1)
    merging.norm, merging.reduction = norm, layer
    for parameter in merging.parameters():
        parameter.requires_grad_(False)
    norm.weight.copy_(torch.tensor([2.0, 3.0]))
    norm.bias.copy_(torch.tensor([1.0, -1.0]))
    layer.weight.copy_(torch.tensor([[5.0, 7.0]]))
    layer.bias.fill_(0.5)
    make_channelwise(merging)
    layer.input_quantizer.set_scale(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 7.0]))
    assert len(reparameterise(merging)) == 1
    # mean scale 2, mean zero point 4.5 -> 4 (half to even); r = .5, 1.5; b = 4, -6
    quantizer = layer.input_quantizer
    assert quantizer.scale.item() == pytest.approx(2) and quantizer.zero_point.item() == 4
    assert norm.weight.tolist() == pytest.approx([4, 2])
    assert norm.bias.tolist() == pytest.approx([1 / 0.5 - 4, -1 / 1.5 + 6])
    assert layer.weight.tolist()[0] == pytest.approx([2.5, 10.5])
    assert layer.bias.item() == pytest.approx(0.5 + 2.5 * 4 - 10.5 * 6)


def test_quantized_function_survives_in_activations(channelwise, images):
    """With activations quantized and weights float, folding changes nothing."""
    inputs = images[1][0].double()
    channelwise.double()
    set_quantization(channelwise, False, True)
    expected = channelwise.extract_feat(inputs)
    reparameterise(channelwise)
    assert worst(channelwise.extract_feat(inputs), expected) < 1e-9


def test_randomise_touches_every_norm(build_quantized):
    """The fixture is only worth something where norms are not the identity."""
    detector = randomise(build_quantized())
    assert all((norm.bias != 0).any() and (norm.weight != 1).any()
               for norm, _, _ in post_norm_pairs(detector))


@pytest.fixture()
def fitted(channelwise, images):
    """(detector, rows that it was fitted to, folds, errors of its quantizers before)."""
    names = {id(module): name for name, module in channelwise.named_modules()}
    seen = {}

    def see(layer, args):
        seen.setdefault(names[id(layer)], []).append(
            layer.input_rows(args[0], torch.Generator().manual_seed(0), 500))

    pairs = post_norm_pairs(channelwise)
    handles = [layer.register_forward_pre_hook(see) for _, layer, _ in pairs]
    for inputs, _ in images:
        channelwise.extract_feat(inputs)
    for handle in handles:
        handle.remove()
    seen = {name: torch.cat(rows) for name, rows in seen.items()}
    before = {name: channelwise.get_submodule(name).input_quantizer.fake_quantize(rows) - rows
              for name, rows in seen.items()}
    twin = copy.deepcopy(channelwise)
    folds = fit_channels(
        channelwise, {name: (rows, torch.ones(len(rows))) for name, rows in seen.items()})
    return channelwise, twin, seen, folds, before


def test_fitted_channels_leave_the_float_function(fitted, images):
    detector, twin, _, folds, _ = fitted
    assert len(folds) == 23
    for inputs, _ in images:  # two of them with padded windows
        expected = twin.extract_feat(inputs)
        assert worst(detector.extract_feat(inputs), expected) < 1e-5
    fold_alike(twin, folds)
    assert worst(twin.backbone(inputs), detector.backbone(inputs)) < 1e-6


def test_fitted_channels_are_quantized_with_less_error(fitted):
    detector, _, seen, folds, before = fitted
    ratios = []
    for name, rows in seen.items():
        quantizer, (ratio, shift) = detector.get_submodule(name).input_quantizer, folds[name]
        assert torch.equal(ratio, torch.ones_like(ratio)) and (quantizer.zero_point == 8).all()
        error = quantizer.fake_quantize(rows - shift) - (rows - shift)
        ratios.append((error.square().mean() / before[name].square().mean()).item())
    assert max(ratios) < 1 + 1e-4 and sum(ratios) / len(ratios) < 0.9


def test_fitted_channels_fold_to_one_tensor(fitted, images):
    """The zero point of all is the middle code, so nothing is left to round."""
    detector, twin, *_ = fitted
    expected = twin.extract_feat(images[1][0])
    folds = reparameterise(detector)
    assert all((shift == 0).all() for _, shift in folds.values())
    assert worst(detector.extract_feat(images[1][0]), expected) < 1e-5
    for _, layer, _ in post_norm_pairs(detector):
        assert layer.input_quantizer.zero_point.tolist() == [8.0]
