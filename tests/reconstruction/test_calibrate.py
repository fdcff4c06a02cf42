"""Calibration: what is seen, and the scales that come of it."""
import copy

import pytest
import torch
from tiny_models import predict
from torch import nn
from toy_chains import Toy

from pfcr_mm.errors import UsageError
from pfcr_mm.models import QuantConfig, convert
from pfcr_mm.models.reparam import make_channelwise, post_norm_pairs
from pfcr_mm.models.swin import QuantShiftWindowMSA
from pfcr_mm.modules import QuantLayer, QuantLinear, QuantMatmul, quantizers_of, set_quantization
from pfcr_mm.quantizers import QuantizerSpec
from pfcr_mm.reconstruction import calibrate, observe
from pfcr_mm.reconstruction.calibrate import Reservoir

METHODS = ('minmax', 'percentile', 'mse', 'output')


def see(detector, images, rows=256):
    with observe(detector, rows) as seen:
        for inputs, samples in images:
            predict(detector, inputs, samples)
    return seen


def scales(model):
    return {n: q.scale.clone() for n, q in quantizers_of(model)}


# --- statistics ------------------------------------------------------------------

def test_all_levels_and_images_are_seen(build_quantized, images):
    detector = build_quantized(weight_bits=4, activation_bits=4)
    maps = [m for inputs, _ in images for m in detector.extract_feat(inputs)]
    assert len(maps) == 15
    seen = see(detector, images)
    reservoir = seen.layers['rpn_head.rpn_conv']
    assert reservoir.low.item() == min(m.min().item() for m in maps)
    assert reservoir.high.item() == max(m.max().item() for m in maps)


def test_each_level_matters(build_quantized):
    """An outlier on one level alone moves the scale, whichever level it is on."""
    detector = build_quantized(weight_bits=4, activation_bits=4)
    maps = [torch.rand(1, 16, s, s) for s in (16, 8, 4, 2, 1)]
    found = []
    for outlier in (None, 0, 2, 4):
        changed = [m * 50 if i == outlier else m for i, m in enumerate(maps)]
        with observe(detector) as seen:
            detector.rpn_head(changed)
        calibrate(detector, seen, 'minmax')
        found.append(detector.rpn_head.rpn_conv.input_quantizer.scale.item())
    assert all(scale > 30 * found[0] for scale in found[1:])


@pytest.mark.parametrize('method', METHODS)
def test_the_second_image_changes_the_statistics(build_quantized, images, method):
    detector = build_quantized(weight_bits=4, activation_bits=4)
    bright = [(images[1][0] * 4, images[1][1])]
    calibrate(detector, see(detector, images[:1]), method)
    one = scales(detector)
    calibrate(detector, see(detector, images[:1] + bright), method)
    two = scales(detector)
    activations = [n for n in one if not n.endswith('weight_quantizer')]
    changed = [n for n in activations if not torch.equal(one[n], two[n])]
    assert len(changed) > 0.8 * len(activations)
    key = 'backbone.patch_embed.projection.input_quantizer'
    assert two[key].item() > 1.3 * one[key].item()


def test_order_of_images_does_not_matter_for_extremes(build_quantized, images):
    detector = build_quantized(weight_bits=4, activation_bits=4)
    forth, back = see(detector, images), see(detector, images[::-1])
    for name, reservoir in forth.layers.items():
        assert torch.equal(reservoir.low, back.layers[name].low)
        assert torch.equal(reservoir.high, back.layers[name].high)


def attention_operand(heads=2, **spec):
    model = nn.ModuleDict(dict(matmul_av=QuantMatmul(
        QuantizerSpec(bits=4, granularity='head', **spec), QuantizerSpec(bits=4), heads)))
    return model, model['matmul_av']


@pytest.mark.parametrize('spec', [dict(kind='log2'), dict(kind='uniform')], ids=['log2', 'uniform'])
def test_padded_queries_are_left_out(spec):
    model, matmul = attention_operand(**spec)
    attention = torch.rand(6, 2, 4, 4) * 0.5 + 0.1  # two images of three windows
    valid = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    padded = ~valid.repeat(2, 1)
    attention.transpose(1, 2)[padded] = 77.0
    matmul.left_quantizer.valid_rows = valid
    with observe(model) as seen:
        matmul(attention, torch.rand(6, 2, 4, 3))
    reservoir = seen.operands['matmul_av.left_quantizer']
    assert reservoir.high.shape == (2, ) and reservoir.high.max() < 1
    assert reservoir.rows.max() < 1
    kept = attention.transpose(1, 2)[~padded]  # (queries, heads, keys)
    assert torch.equal(reservoir.high, kept.amax((0, 2)))
    # without the mask the padding would be seen
    matmul.left_quantizer.valid_rows = None
    with observe(model) as seen:
        matmul(attention, torch.rand(6, 2, 4, 3))
    assert seen.operands['matmul_av.left_quantizer'].high.max() == 77


def test_windows_say_which_queries_are_padding(build_quantized):
    """Token maps of 64x96 images: 16x24 is padded to 21x28, three by four windows."""
    detector = build_quantized()
    detector.extract_feat(torch.randn(2, 3, 64, 96))
    for block in detector.backbone.stages[0].blocks:
        valid = block.attn.w_msa.matmul_av.left_quantizer.valid_rows
        assert valid.shape == (12, 49) and valid.sum() == 16 * 24
    first, second = (b.attn.w_msa.matmul_av.left_quantizer.valid_rows
                     for b in detector.backbone.stages[0].blocks)
    assert not torch.equal(first, second)  # the second is shifted
    detector.extract_feat(torch.randn(1, 3, 224, 224))  # 56x56 needs no padding
    assert detector.backbone.stages[0].blocks[0].attn.w_msa.matmul_av.left_quantizer \
        .valid_rows is None


def test_valid_rows_are_the_real_tokens(build_quantized):
    """Attention of padded queries, traced by poisoning, is what the mask leaves out."""
    detector = build_quantized()
    attention = detector.backbone.stages[0].blocks[1].attn
    assert isinstance(attention, QuantShiftWindowMSA) and attention.shift_size == 3
    real = torch.zeros(1, 16, 24, 1)
    tokens = []
    attention.w_msa.register_forward_pre_hook(lambda module, args: tokens.append(args))
    attention.pad_value.fill_(-9.0)
    attention(real.view(1, -1, 1).expand(-1, -1, 16), (16, 24))
    windows, _, valid = tokens[0]
    assert torch.equal(windows[..., 0] == 0, valid)


def test_masked_entries_do_not_enter_the_log_search():
    model, matmul = attention_operand(kind='log2')
    attention = torch.rand(1, 2, 50, 50) * 0.5 + 0.3
    attention[..., 10:] = 0  # masked keys
    with observe(model, rows=4096) as seen:
        matmul(attention, torch.rand(1, 2, 50, 3))
    rows = seen.operands['matmul_av.left_quantizer'].rows
    assert len(rows) > 20 and rows.min() >= 0.3


def test_what_is_tiny_in_one_head_is_seen_in_the_others():
    """Heads that look elsewhere, sharply: no position counts in all of them."""
    model, matmul = attention_operand(kind='log2')
    attention = torch.full((1, 2, 50, 50), 1e-14)
    attention[:, 0, :, :25] = attention[:, 1, :, 25:] = 0.04
    with observe(model, rows=4096) as seen:
        matmul(attention, torch.rand(1, 2, 50, 3))
    rows = seen.operands['matmul_av.left_quantizer'].rows
    assert len(rows) == 50 * 50 and (rows.amax(1) == 0.04).all()


# --- the reservoir -----------------------------------------------------------------

def test_reservoir_keeps_extremes_and_a_fair_sample():
    reservoir, generator = Reservoir(500), torch.Generator().manual_seed(0)
    for i in range(40):
        rows = torch.full((100 if i else 1000, 1), float(i))
        reservoir.add(rows, rows.amin().view(1), rows.amax().view(1), generator)
    assert len(reservoir.rows) == 500
    assert (reservoir.low.item(), reservoir.high.item()) == (0, 39)
    share = (reservoir.rows == 0).float().mean().item()
    assert share == pytest.approx(1000 / 4900, abs=0.06)
    assert reservoir.rows.mean().item() == pytest.approx(39 * 20 * 100 / 4900, rel=0.1)


def test_observing_is_reproducible_and_leaves_no_hooks(build_quantized, images):
    detector = build_quantized()
    hooks = [len(m._forward_pre_hooks) for m in detector.modules()]
    first, second = see(detector, images[:1], rows=32), see(detector, images[:1], rows=32)
    for name, reservoir in first.layers.items():
        assert torch.equal(reservoir.rows, second.layers[name].rows)
    assert [len(m._forward_pre_hooks) for m in detector.modules()] == hooks


def test_observing_switches_quantizers_off(quantized, float_detector, images):
    inputs = images[0][0]
    with observe(quantized):
        maps = quantized.extract_feat(inputs)
    assert all(torch.equal(a, b) for a, b in zip(maps, float_detector.extract_feat(inputs)))


def test_hooks_go_when_the_forward_fails():
    model = nn.Sequential(nn.Linear(2, 2))
    convert(model, QuantConfig())
    with pytest.raises(RuntimeError), observe(model):
        model(torch.zeros(1, 3))
    assert not model[0]._forward_pre_hooks


# --- scales ------------------------------------------------------------------------

@pytest.mark.parametrize('method', METHODS)
def test_every_quantizer_is_calibrated(build_quantized, images, method):
    detector = build_quantized(weight_bits=4, activation_bits=4)
    assert calibrate(detector, see(detector, images), method) == []
    for name, quantizer in quantizers_of(detector):
        assert quantizer.calibrated, name
        assert torch.isfinite(quantizer.scale).all() and (quantizer.scale > 0).all()
        assert torch.equal(quantizer.zero_point, quantizer.zero_point.round())


def test_layers_that_no_data_reached_are_named():
    model = nn.ModuleDict(dict(a=nn.Linear(3, 2), b=nn.Linear(3, 2)))
    convert(model, QuantConfig())
    with observe(model) as seen:
        model['a'](torch.randn(5, 3))
        model['b'](torch.randn(0, 3))
    assert calibrate(model, seen, 'output') == ['b']
    set_quantization(model, True, True)
    assert model['a'].input_quantizer.enabled
    assert not model['b'].input_quantizer.enabled and model['b'].weight_quantizer.enabled
    model['b'](torch.randn(4, 3))


def test_minmax_by_hand():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[-1.0, 2.0]])
    convert(model, QuantConfig(weight_bits=2, activation_bits=4))
    with observe(model) as seen:
        model(torch.tensor([[-3.0, 1.0]]))
        model(torch.tensor([[12.0, 0.0]]))
    calibrate(model, seen, 'minmax')
    layer = model[0]
    assert (layer.input_quantizer.scale.item(), layer.input_quantizer.zero_point.item()) == (1, 3)
    assert (layer.weight_quantizer.scale.item(), layer.weight_quantizer.zero_point.item()) == (1, 1)


def test_output_is_no_worse_than_mse_on_the_layers_output():
    torch.manual_seed(1)
    model = Toy(branches=2).requires_grad_(False)
    teacher = copy.deepcopy(model)
    convert(model, QuantConfig(weight_bits=3, activation_bits=3))
    x = torch.randn(200, 12) * torch.logspace(-1, 1, 12)
    with observe(model) as seen:
        model(x)
    errors = {}
    for method in ('mse', 'output'):
        calibrate(model, seen, method)
        set_quantization(model, True, True)
        errors[method] = [
            (layer(rows) - teacher.get_submodule(name)(rows)).square().mean().item()
            for name, layer in model.named_modules() if isinstance(layer, QuantLayer)
            for rows in [seen.layers[name].rows]
        ]
    assert all(b <= a * 1.02 for a, b in zip(errors['mse'], errors['output']))
    assert sum(errors['output']) < sum(errors['mse'])


def test_weights_alone_keep_activation_scales(build_quantized, images):
    detector = build_quantized(weight_bits=4, activation_bits=4)
    calibrate(detector, see(detector, images), 'percentile')
    before = scales(detector)
    for module in detector.modules():
        if isinstance(module, QuantLayer):
            module.weight.mul_(2)
    calibrate(detector, see(detector, images), 'minmax', activations=False)
    after = scales(detector)
    for name in before:
        if name.endswith('weight_quantizer'):
            assert not torch.equal(before[name], after[name])
        else:
            assert torch.equal(before[name], after[name])


def test_channelwise_inputs_get_a_scale_a_channel(build_quantized, images):
    detector = build_quantized(weight_bits=4, activation_bits=4)
    make_channelwise(detector)
    seen = see(detector, images)
    calibrate(detector, seen, 'minmax')
    names = {id(m): n for n, m in detector.named_modules()}
    for _, layer, _ in post_norm_pairs(detector):
        reservoir = seen.layers[names[id(layer)]]
        quantizer = layer.input_quantizer
        assert quantizer.scale.shape == (layer.weight.shape[1], )
        span = reservoir.high.clamp(min=0) - reservoir.low.clamp(max=0)
        torch.testing.assert_close(quantizer.scale, (span / 15).clamp(min=1e-8))


def test_unknown_method(build_quantized):
    with pytest.raises(UsageError, match="calibration.method='kl' is not known.*'percentile'"):
        calibrate(build_quantized(), None, 'kl')


@pytest.mark.parametrize('column', [0, 1, 17, 383])
def test_an_outlier_in_any_column_of_a_wide_layer_counts(column):
    """Sub-sampling must not step over the same columns in every row."""
    layer = QuantLinear.from_float(torch.nn.Linear(384, 4), 8, 4)
    x = torch.randn(4096, 384)
    x[:, column] *= 50
    with observe(layer, rows=4096) as seen:
        for part in x.split(512):
            layer(part)
    calibrate(layer, seen, method='mse')
    plain = QuantLinear.from_float(torch.nn.Linear(384, 4), 8, 4)
    with observe(plain, rows=4096) as seen:
        for part in torch.randn(4096, 384).split(512):
            plain(part)
    calibrate(plain, seen, method='mse')
    assert layer.input_quantizer.scale > 3 * plain.input_quantizer.scale
