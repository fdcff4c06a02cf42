"""Heads whose channels are made alike: exact in float, and less error when quantized."""
import copy
import math

import pytest
import torch
from mmdet.models.backbones.swin import WindowMSA
from mmengine.registry import MODELS
from test_reparam import worst
from tiny_classifiers import ARGS, build_classifier, pictures
from tiny_models import fold_by
from torch import nn

from pfcr_mm.analysis.twins import align
from pfcr_mm.errors import UsageError
from pfcr_mm.models import QuantConfig, convert
from pfcr_mm.models.backbones.attention import MatmulAttention
from pfcr_mm.models.checkpoint import (
    load_quantized,
    manifest_of,
    read_checkpoint,
    save_quantized,
)
from pfcr_mm.models.head_folds import (
    BUFFERS,
    fold_heads,
    free_heads,
    hadamard,
    let_heads_fold,
)
from pfcr_mm.models.reparam import fold_alike
from pfcr_mm.modules import QuantMatmul, set_quantization
from pfcr_mm.reconstruction import AttendedValues, calibrate, harden, observe

KINDS = list(ARGS)
BITS = dict(weight_bits=4, activation_bits=4)
OFF = dict(balance_values=False, centre_heads=False, rotate_heads=False)


def unequal(kind, **quant):
    """(model whose heads have channels of very different size and mean, images)."""
    model = build_classifier(kind, **BITS, **quant)
    generator = torch.Generator().manual_seed(5)
    for attention in [m for m in model.modules() if hasattr(m, 'matmul_av')]:
        width = attention.proj.in_features
        gain = torch.exp(torch.randn(3 * width, generator=generator))
        attention.qkv.weight.mul_(gain[:, None])
        attention.qkv.bias.mul_(gain).add_(2 * torch.randn(3 * width, generator=generator))
    return model, pictures(kind)


def fold(model, x):
    """Fold by what layers are given for the images `x`."""
    return fold_by(model, lambda: model(x))


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


def operands(model, run):
    """(k of the first product, v of the second) of each attention, (B, heads, N, channels)."""
    found = []
    for attention in [m for m in model.modules() if isinstance(getattr(m, 'matmul_qk', None),
                                                               QuantMatmul)]:
        keys, values = inputs_of(
            [attention.matmul_qk.right_quantizer, attention.matmul_av.right_quantizer], run)
        found.append((keys.transpose(-2, -1), values))
    return found


@pytest.mark.parametrize('size', [1, 2, 3, 6, 8, 12, 16, 64, 80])
def test_a_hadamard_matrix(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    odd = size // (size & -size)
    assert matrix.abs().max() <= math.sqrt((2 if odd > 1 else 1) / size) + 1e-12


def two_channels(**quant):
    """(model of one attention with a head of two channels, its qkv, its proj)."""
    attention = WindowMSA(2, 1, (1, 1)).requires_grad_(False)
    root = nn.Sequential(attention)
    convert(root, QuantConfig(**BITS, **{**OFF, **quant}))
    qkv, proj = attention.qkv, attention.proj
    for parameter in (qkv.weight, qkv.bias, proj.bias):
        parameter.copy_(torch.arange(1.0, 1 + parameter.numel()).view_as(parameter))
    proj.weight.copy_(torch.tensor([[5.0, 7.0], [1.0, -1.0]]))
    return root, qkv, proj


# proj's input: deviations 1 and 9; qkv's: mean (1, -1)
ROWS = {'0.qkv': torch.tensor([[0.0, -1.0], [2.0, -1.0]]),
        '0.proj': torch.tensor([[3.0, 6.0]]) + torch.tensor([[-1.0, -9.0], [1.0, 9.0]]) / 2**0.5}


def test_balance_by_hand():
    """Deviations 1 and 9, mean 5: values are divided by sqrt(1/5) and sqrt(9/5)."""
    root, qkv, proj = two_channels(balance_values=True)
    (name, found), = fold_heads(root, ROWS).items()
    low, high = 0.2**0.5, 1.8**0.5
    assert name == '0' and list(found) == ['value_ratio']
    assert found['value_ratio'].tolist() == root[0].value_ratio.tolist() == pytest.approx(
        [low, high])
    assert qkv.weight[:4].flatten().tolist() == list(range(1, 9))  # q and k stay
    assert qkv.bias[:4].tolist() == [1, 2, 3, 4]
    assert qkv.weight[4:].flatten().tolist() == pytest.approx(
        [9 / low, 10 / low, 11 / high, 12 / high])
    assert qkv.bias[4:].tolist() == pytest.approx([5 / low, 6 / high])
    assert proj.weight.flatten().tolist() == pytest.approx([5 * low, 7 * high, low, -high])
    assert proj.bias.tolist() == [1, 2]


def test_centre_by_hand():
    """Keys: (5 - 6 + 3, 7 - 8 + 4) = (2, 3) in the mean; values lose (3, 6)."""
    root, qkv, proj = two_channels(centre_heads=True)
    found = fold_heads(root, ROWS, {'0': torch.tensor([3.0, 6.0])})['0']
    assert {key: value.tolist() for key, value in found.items()} == {
        'key_mean': [2, 3], 'value_mean': pytest.approx([3, 6])}
    assert qkv.weight.flatten().tolist() == list(range(1, 13))
    assert qkv.bias.tolist() == pytest.approx([1, 2, 3 - 2, 4 - 3, 5 - 3, 6 - 6])
    assert proj.weight.flatten().tolist() == [5, 7, 1, -1]
    assert proj.bias.tolist() == pytest.approx([1 + 5 * 3 + 7 * 6, 2 + 3 - 6])


def test_turn_by_hand():
    """A pair (a, b) becomes (a + b, a - b) / sqrt 2: of q, of k, of v, of proj's columns."""
    root, qkv, proj = two_channels(rotate_heads=True)
    assert fold_heads(root, ROWS)['0'] == {'turned': 1}
    root2 = 2**0.5
    assert (qkv.weight * root2).flatten().tolist() == pytest.approx(
        [4, 6, -2, -2, 12, 14, -2, -2, 20, 22, -2, -2])
    assert (qkv.bias * root2).tolist() == pytest.approx([3, -1, 7, -1, 11, -1])
    assert (proj.weight * root2).flatten().tolist() == pytest.approx([12, -2, 0, 2])
    assert proj.bias.tolist() == [1, 2]


@pytest.mark.parametrize('turned', [False, True])
def test_centre_of_queries_by_hand(turned):
    """(1 - 2 + 1, 3 - 4 + 2) = (0, 1) in the mean, times 2^-1/2; turned (1, -1) times 1/2."""
    root, qkv, _ = two_channels(centre_queries=True, rotate_heads=turned)
    before = qkv.bias.clone()
    assert len(fold_heads(root, ROWS)) == 1
    centre = root[0].matmul_qk.left_centre
    assert centre.shape == (1, 1, 2)
    assert centre.flatten().tolist() == pytest.approx(
        [0.5, -0.5] if turned else [0, 0.5**0.5], abs=1e-6)
    assert turned or torch.equal(qkv.bias, before)  # queries stay what they are


def test_attended_values_by_hand():
    """Weights 3/4 and 1/4, 1/2 and 1/2 of values 1 and 5: squares of a key sum to 13/16, 5/16."""
    root, *_ = two_channels(centre_heads=True)
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).expand(1, 1, 2, 2)
    values = torch.tensor([[1.0, 0.0], [5.0, 18.0]]).expand(1, 1, 2, 2)
    with AttendedValues(root) as attended:
        root[0].matmul_av(weights, values)
    assert attended.means['0'].tolist() == pytest.approx([(13 + 25) / 18, 5])
    with AttendedValues(root) as attended:  # the second query is padding
        root[0].matmul_av.left_quantizer.valid_rows = torch.tensor([[True, False]])
        root[0].matmul_av(weights, values)
    assert attended.means['0'].tolist() == pytest.approx([1.4, 1.8])


@pytest.mark.parametrize('on', [*OFF, 'all'])
@pytest.mark.parametrize('kind', KINDS)
def test_exact_in_double(kind, on):
    quant = {} if on == 'all' else {**OFF, on: True}
    model, x = unequal(kind, **quant)
    model, x = model.double(), x.double()
    expected = model(x)
    before = copy.deepcopy(model.state_dict())
    assert len(fold(model, x)) == len(free_heads(model)) > 1
    assert worst([model(x)], [expected]) < 1e-10
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_exact_in_a_swin_detector(build_quantized, images):
    """mmdet's own window attention, windows padded and shifted."""
    model = build_quantized(weight_bits=4, activation_bits=4).double()
    x = images[1][0].double()
    expected = model.backbone(x)
    folds = fold_by(model, lambda: model.backbone(x))
    assert len(folds) == 8
    assert worst(model.backbone(x), expected) < 1e-10


@pytest.mark.parametrize('kind', KINDS)
def test_queries_are_quantized_about_their_mean(kind):
    model, x = unequal(kind, centre_queries=True)
    model, x = model.double(), x.double()
    expected = model(x)
    products = [m.matmul_qk for m in model.modules() if hasattr(m, 'matmul_qk')]
    before = inputs_of([m.left_quantizer for m in products], lambda: model(x))
    fold(model, x)
    after = inputs_of([m.left_quantizer for m in products], lambda: model(x))
    assert worst([model(x)], [expected]) < 1e-10
    for old, new in zip(before, after):
        assert new.square().mean() < 0.8 * old.square().mean()
        if kind != 'swin':  # there padding counts among what qkv is given
            assert new.mean((0, 2)).abs().max() < 0.05 * new.std()
    assert products[0].left_centre.dtype == torch.float64


@pytest.mark.parametrize('kind', KINDS)
def test_what_products_are_given(kind):
    """Keys without a mean, values without one by squares of attention; channels of one size."""
    model, x = unequal(kind)
    model, x = model.double(), x.double()
    before = operands(model, lambda: model(x))
    fold(model, x)
    after = operands(model, lambda: model(x))
    if kind != 'swin':  # there padding counts among what qkv is given
        for keys, _ in after:
            assert keys.mean((0, 2)).abs().max() < 0.05 * keys.std()
    with AttendedValues(model) as attended:
        model(x)
    assert all(mean.abs().max() < 1e-4 for mean in attended.means.values())

    def unevenness(t):  # the largest channel of each head against its mean channel
        size = t.square().mean((0, 2)).sqrt()
        return (size.amax(1) / size.mean(1)).mean().item()

    for which in (0, 1):
        old, new = ([unevenness(pair[which]) for pair in pairs] for pairs in (before, after))
        assert sum(new) < (0.8, 0.9)[which] * sum(old)


def test_a_channel_that_is_always_zero_is_harmless():
    model, x = unequal('vit')
    for free in free_heads(model).values():
        free.qkv.weight[-1].zero_()
        free.qkv.bias[-1].zero_()
    expected = model(x)
    fold(model, x)
    assert worst([model(x)], [expected]) < 1e-4


def test_an_attention_whose_output_is_constant_is_not_balanced():
    model, x = unequal('vit')
    first = next(iter(free_heads(model).values()))
    for parameter in (first.qkv.weight, first.qkv.bias):
        parameter[-len(parameter) // 3:].zero_()
    expected = model(x)
    fold(model, x)
    assert first.attention.value_ratio.unique().tolist() == [1]
    assert worst([model(x)], [expected]) < 1e-5


def attention_errors(kind, method, **quant):
    """Squared error of each attention's output for float inputs, everything quantized."""
    model, x = unequal(kind, **quant)
    attentions = [m for m in model.modules() if hasattr(m, 'matmul_av')]
    given = inputs_of(attentions, lambda: model(x))
    expected = [attention(y) for attention, y in zip(attentions, given)]
    fold(model, x)
    with observe(model, 256) as seen:
        model(x)
    calibrate(model, seen, method)
    set_quantization(model, True, True)
    return [(attention(y) - z).square().mean().item()
            for attention, y, z in zip(attentions, given, expected)]


@pytest.mark.parametrize('kind', KINDS)
def test_less_error_where_channels_are_unequal(kind):
    plain, turned, ours = (sum(attention_errors(kind, 'mse', **quant)) for quant in (
        OFF, {**OFF, 'rotate_heads': True}, {}))
    assert turned < 0.9 * plain and ours < 0.7 * plain


def query_errors(kind, method, **quant):
    """Squared error of q k^T in each attention, for float inputs, by queries alone."""
    model, x = unequal(kind, **quant)
    fold(model, x)
    with observe(model, 256) as seen:
        model(x)
    calibrate(model, seen, method)
    products = [m.matmul_qk for m in model.modules() if hasattr(m, 'matmul_qk')]
    pairs = []
    handles = [m.register_forward_pre_hook(lambda _, args: pairs.append(args)) for m in products]
    set_quantization(model, False, False)
    model(x)
    for handle in handles:
        handle.remove()
    errors = []
    for product, (left, right) in zip(products, pairs):
        product.left_quantizer.enabled = True
        errors.append((product(left, right) - left @ right).square().mean().item())
    return errors


@pytest.mark.parametrize('method', ['mse', 'output'])
@pytest.mark.parametrize('kind', KINDS)
def test_less_error_of_queries_about_their_mean(kind, method):
    plain, ours = (query_errors(kind, method, centre_queries=centred)
                   for centred in (False, True))
    ratios = [new / old for new, old in zip(ours, plain)]
    assert math.prod(ratios)**(1 / len(ratios)) < 0.8 and sorted(ratios)[1] < 0.9


def test_an_attention_of_its_own_is_left_alone():
    """Centred values would be wrong where rows of attention do not sum to one."""
    class Sink(MatmulAttention):
        def attend(self, x, position_bias=None, valid=None):
            return super().attend(x, position_bias, valid) / 2

    model = build_classifier('vit', **BITS, **OFF)
    for block in model.backbone.blocks:
        block.attn.__class__ = Sink
    let_heads_fold(model, QuantConfig(**BITS))
    assert free_heads(model) == {}


def test_switched_off():
    model, x = unequal('vit', **OFF)
    assert free_heads(model) == {} and fold(model, x) == {}
    assert not any('value_' in key or 'key_' in key or 'turned' in key
                   for key in model.state_dict())


@pytest.mark.parametrize('excluded, keys, values', [
    ('*.attn.proj', True, False), ('*.attn.qkv', True, True), ('*.matmul_av', True, True),
    ('*.matmul_qk', False, True), ('*.attn.[pq]*', True, False)])
def test_what_is_not_quantized(excluded, keys, values):
    """What reads float operands gains nothing; a float qkv or product of values is no hindrance."""
    model, x = unequal('vit', exclude=[excluded])
    expected = model(x)
    found = free_heads(model).values()
    assert {(free.tables is not None, free.proj is not None) for free in found} == {(keys, values)}
    assert len(fold(model, x)) == 4
    assert worst([model(x)], [expected]) < 1e-5


@pytest.mark.parametrize('exclude', [[], ['*.attn.qkv']])
def test_without_biases(exclude):
    """A quantized qkv behind a norm is given one; one that stays float is not."""
    args = dict(ARGS['vit'], timm_args=dict(
        ARGS['vit']['timm_args'], qkv_bias=False, proj_bias=False))
    model = MODELS.build(dict(
        type='pfcr_mm.QuantDetector', arch='pfcr_mm.TimmClassifier',
        quant=dict(BITS, exclude=exclude), **args))
    model.requires_grad_(False)
    x = pictures('vit')
    expected = model.eval()(x)
    assert {free.qkv.bias is None for free in free_heads(model).values()} == {bool(exclude)}
    assert len(fold(model, x)) == 4
    assert worst([model(x)], [expected]) < 1e-5


def test_a_twin_is_folded_alike():
    model, x = unequal('swin')
    twin = copy.deepcopy(model)
    fold_alike(twin, fold(model, x))
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


@pytest.fixture(scope='module', params=['vit', 'swin'])
def saved(request, tmp_path_factory):
    """(kind, hardened model, images, path of its checkpoint, folded float model)."""
    kind = request.param
    model, x = unequal(kind, centre_queries=True)
    fold(model, x)
    floating = copy.deepcopy(model)
    with observe(model, 256) as seen:
        model(x)
    calibrate(model, seen, 'mse')
    set_quantization(model, True, True)
    harden(model)
    path = str(tmp_path_factory.mktemp(kind) / 'quantized.pth')
    save_quantized(model, path, {})
    return kind, model, x, path, floating


def test_a_checkpoint_holds_the_folds(saved):
    kind, model, x, path, _ = saved
    fresh = build_classifier(kind, seed=1, **BITS, centre_queries=True)
    load_quantized(fresh, read_checkpoint(path), path)
    assert torch.equal(fresh(x), model(x))
    for own, other in zip(free_heads(fresh).values(), free_heads(model).values()):
        own, other = own.attention, other.attention
        for key in BUFFERS:
            assert torch.equal(getattr(own, key), getattr(other, key))
        assert (own.value_ratio - 1).abs().max() > 0.1
        assert own.key_mean.abs().max() > 0.1 and own.turned == 1
        assert torch.equal(own.matmul_qk.left_centre, other.matmul_qk.left_centre)
        assert own.matmul_qk.left_centre.abs().max() > 0.1


@pytest.mark.parametrize('key', [*OFF, 'centre_queries'])
def test_a_checkpoint_of_the_other_kind_is_refused(saved, key):
    kind, *_, path, _ = saved
    other = build_classifier(kind, **BITS, **{'centre_queries': True, key: False})
    with pytest.raises(UsageError, match=rf'quant\.{key}=True, the config says False'):
        load_quantized(other, read_checkpoint(path), path)


def test_a_file_that_is_older_than_the_keys(tmp_path):
    """It was made without the folds, and loads with the config that says so."""
    model, _ = unequal('vit', **OFF)
    with observe(model, 256) as seen:
        model(pictures('vit'))
    calibrate(model, seen, 'mse')
    set_quantization(model, True, True)
    harden(model)
    path = str(tmp_path / 'old.pth')
    save_quantized(model, path, {})
    checkpoint = read_checkpoint(path)
    for key in (*OFF, 'centre_queries'):
        del manifest_of(checkpoint)['quant'][key]
    fresh = build_classifier('vit', seed=1, **BITS, **OFF)
    load_quantized(fresh, checkpoint, path)
    assert torch.equal(fresh(pictures('vit')), model(pictures('vit')))
    with pytest.raises(UsageError, match=(
            'is older than quant.balance_values; load it with model.quant.balance_values=False '
            'model.quant.centre_heads=False model.quant.rotate_heads=False')):
        load_quantized(build_classifier('vit', **BITS), checkpoint, path)


@pytest.mark.parametrize('kind', KINDS)
def test_a_twin_goes_from_one_fold_to_another(kind):
    first, x = unequal(kind)
    second, twin = copy.deepcopy(first), copy.deepcopy(first)
    fold(first, x)
    fold(second, pictures(kind, seed=1)[:1])
    assert worst([first.state_dict()[key] for key in first.state_dict() if 'key_mean' in key],
                 [second.state_dict()[key] for key in second.state_dict() if 'key_mean' in key]
                 ) > 0.01
    before = twin(x)
    for model in (first, second, first):
        align(twin, model)
        assert worst([twin(x)], [before]) < 1e-5
        for own, other in zip(free_heads(twin).values(), free_heads(model).values()):
            for ours, theirs in ((own.qkv, other.qkv), (own.proj, other.proj)):
                assert worst([ours.weight], [theirs.weight]) < 1e-5
                assert worst([ours.bias], [theirs.bias]) < 1e-5


def test_a_twin_of_a_loaded_checkpoint_is_folded_alike(saved):
    kind, _, x, path, expected = saved
    loaded = build_classifier(kind, seed=1, **BITS, centre_queries=True)
    load_quantized(loaded, read_checkpoint(path), path)
    twin, _ = unequal(kind)
    before = twin(x)
    for _ in range(2):  # what is folded already is not folded again
        align(twin, loaded)
        assert worst([twin(x)], [before]) < 1e-5
        for own, other in zip(free_heads(twin).values(), free_heads(expected).values()):
            for ours, theirs in ((own.qkv, other.qkv), (own.proj, other.proj)):
                assert worst([ours.weight], [theirs.weight]) < 1e-4
                assert worst([ours.bias], [theirs.bias]) < 1e-4
