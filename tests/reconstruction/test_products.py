"""Scales of matmuls' operands by the error of the product."""
import pytest
import torch
from torch import nn

from pfcr_mm import parallel
from pfcr_mm.modules import QuantMatmul, set_quantization
from pfcr_mm.quantizers import QuantizerSpec
from pfcr_mm.reconstruction import calibrate, observe
from pfcr_mm.reconstruction.products import ProductSample, part_of, refine_products

HEADS, KEYS = 2, 60
POWERS = QuantizerSpec(kind='log2', bits=4, granularity='head')
STEPS = QuantizerSpec(bits=4, granularity='head')


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def attention(rows=40, seed=0):
    """Weights of which one is large in some rows and all are alike in the others, and values."""
    logits = torch.randn(1, HEADS, rows, KEYS, generator=seeded(seed))
    logits[:, :, ::4, 7] += 6
    values = 1 + torch.randn(1, HEADS, KEYS, 8, generator=seeded(seed + 1))
    return logits.softmax(-1), values


def calibrated(method, left=POWERS, right=STEPS, inputs=None):
    model = nn.ModuleDict(dict(av=QuantMatmul(left, right, HEADS)))
    with observe(model) as seen:
        for number, pair in enumerate(inputs or [attention(seed=s) for s in (0, 2, 4)]):
            seen.begin_image(number)
            model.av(*pair)
    assert calibrate(model, seen, method) == []
    set_quantization(model, True, True)
    return model.av, seen


def product_error(matmul, pairs):
    """Of each head."""
    return sum((matmul(*pair) - pair[0] @ pair[1]).square().sum((0, 2, 3)) for pair in pairs)


# --- what is kept ----------------------------------------------------------------

def test_rows_are_of_the_windows_they_are_multiplied_in():
    left = torch.rand(9, HEADS, 5, KEYS, generator=seeded())
    right = torch.rand(9, HEADS, KEYS, 20, generator=seeded(1))
    some, others = part_of(left, right, None, seeded())
    assert some.shape == (4, HEADS, 16, KEYS) and others.shape == (4, HEADS, KEYS, 16)

    def columns(x):
        return {tuple(column) for column in x[0].t().tolist()}

    windows = [next(i for i in range(9) if columns(one) <= columns(right[i])) for one in others]
    assert len(set(windows)) == 4
    for window, rows in zip(windows, some):
        for row in rows.unbind(1):
            assert any(torch.equal(row, one) for one in left[window].unbind(1))


def test_long_rows_are_fewer():
    left = torch.rand(1, HEADS, 50, 4000, generator=seeded())
    some, others = part_of(left, left.transpose(2, 3), None, seeded())
    assert some.shape == (1, HEADS, 16, 4000) and others.shape == (1, HEADS, 4000, 16)


def test_padding_is_not_looked_at():
    left = torch.arange(6.0).view(6, 1, 1, 1).expand(6, HEADS, 5, KEYS).clone()
    left[:, :, 3:] = -1
    valid = torch.tensor([[True] * 3 + [False] * 2, [False] * 5, [True] + [False] * 4])
    for seed in range(20):
        some, _ = part_of(left, torch.ones(6, HEADS, KEYS, 3), valid, seeded(seed))
        assert set(some.unique().tolist()) == {0, 2, 3, 5}  # of two images' windows
    assert part_of(left, left, torch.zeros(3, 5, dtype=torch.bool), seeded()) is None


def offered(images, parts, sizes, budget=60):
    """The images kept of those that processes are offered, in this order."""
    samples = [ProductSample(budget) for _ in range(parts)]
    for place, image in enumerate(images):
        sample, key = samples[place % parts], torch.rand((), generator=seeded(image)).item()
        if key < sample.bound:
            sample.add(key, torch.full((1, 1, 1, sizes[image]), float(image)), torch.ones(1))
    with pytest.MonkeyPatch.context() as patch:
        found = [(sample.entries, sample.bound) for sample in samples]
        patch.setattr(parallel, 'gather', lambda _: found)
        samples[0].settle()
    return [int(left.flatten()[0]) for _, left, _ in samples[0].entries]


@pytest.mark.parametrize('parts', [1, 2, 4])
def test_what_is_kept_does_not_depend_on_order_and_processes(parts):
    sizes = [3, 40, 7, 21, 2, 33, 9, 1, 26, 5, 12, 30]  # images are of any size
    first = offered(range(12), 1, sizes)
    assert 1 < len(first) < 12
    for seed in range(50):
        order = torch.randperm(12, generator=seeded(seed)).tolist()
        assert offered(order, parts, sizes) == first


def test_one_image_is_kept_however_large():
    assert len(offered(range(3), 2, [90, 80, 70])) == 1


def test_products_are_sampled_only_where_scales_are_searched_by_them():
    model = nn.ModuleDict(dict(av=QuantMatmul(POWERS, STEPS, HEADS)))
    for options in (dict(activations=True), dict(products=False)):
        with observe(model, **options) as seen:
            assert seen.products == {}


# --- what is found ---------------------------------------------------------------

def test_scales_are_those_of_least_error_by_hand():
    """All scales of a log2 grid tried one by one, in plain numbers."""
    weights, values = attention()
    sample = ProductSample()
    sample.add(0.0, weights, values)
    matmul, _ = calibrated('mse', inputs=[(weights, values)])
    quantized = matmul.right_quantizer(values)  # as it is when the left operand's turn comes
    refine_products(nn.ModuleDict(dict(av=matmul)), {'av': sample}, rounds=1)

    def error(weights_hat):
        return (weights_hat @ quantized - weights @ values).square().sum((0, 2, 3))

    top, errors = weights.amax((0, 2, 3)), []
    for step in range(33):
        scale = (top * 2**(-step / 8)).view(1, HEADS, 1, 1)
        codes = (-torch.log2(weights / scale)).round().clamp(min=0)
        errors.append(error(torch.where(codes >= 15, 0.0, scale * 2**-codes)))
    assert (error(matmul.left_quantizer(weights)) <= torch.stack(errors).amin(0) * 1.00001).all()


def test_images_of_one_shape_are_multiplied_together():
    sample = ProductSample()
    for key, keys in ((0.3, 5), (0.1, 4), (0.2, 5)):
        sample.add(key, torch.full((1, HEADS, 2, keys), key), torch.ones(1, HEADS, keys, 3))
    assert [tuple(left.shape) for left, _ in sample.pairs] == [(1, 2, 2, 4), (2, 2, 2, 5)]
    assert sample.pairs[1][0][:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.3])


@pytest.mark.parametrize('kind', ['log2', 'log_sqrt2', 'adalog', 'uniform'])
@pytest.mark.parametrize('granularity', ['head', 'tensor'])
def test_products_gain_in_what_was_sampled(kind, granularity):
    left = QuantizerSpec(kind=kind, bits=4, granularity=granularity)
    before, seen = calibrated('mse', left)
    after, _ = calibrated('output', left)
    before, after = (product_error(m, seen.products['av'].pairs) for m in (before, after))
    if granularity == 'tensor':
        before, after = before.sum(), after.sum()
    assert (after <= before * 1.00001).all() and (after < 0.97 * before).any()


def test_many_small_weights_are_not_lost():
    """Uniform steps that fit the large ones best round many others to zero."""
    left = QuantizerSpec(bits=4, granularity='head')
    pairs = [attention(seed=s) for s in (0, 2, 4)]
    by_elements, by_products = (
        product_error(calibrated(method, left)[0], pairs) for method in ('mse', 'output'))
    assert (by_products < 0.8 * by_elements).all()


def test_queries_and_keys_too():
    pairs = [(torch.randn(1, HEADS, 40, 8, generator=seeded(s)),
              torch.randn(1, HEADS, 8, 40, generator=seeded(s + 1)) - 0.3) for s in (0, 2, 4)]
    _, seen = calibrated('mse', STEPS, STEPS, pairs)
    errors = [product_error(calibrated(method, STEPS, STEPS, pairs)[0], seen.products['av'].pairs)
              for method in ('mse', 'output')]
    assert (errors[1] < errors[0]).all()


def test_the_product_is_that_of_operands_with_their_centre():
    """What a quantized right operand makes of the centre is an error too."""
    pairs = [(5 + torch.randn(1, HEADS, 40, 8, generator=seeded(s)),
              torch.randn(1, HEADS, 8, 40, generator=seeded(s + 1))) for s in (0, 2, 4)]
    model = nn.ModuleDict(dict(qk=QuantMatmul(STEPS, STEPS, HEADS)))
    model.qk.give_centre(8)
    model.qk.left_centre.fill_(5.0)
    with observe(model) as seen:
        for number, pair in enumerate(pairs):
            seen.begin_image(number)
            model.qk(*pair)
    errors = []
    for method in ('mse', 'output'):
        calibrate(model, seen, method)
        set_quantization(model, True, True)
        errors.append(product_error(model.qk, seen.products['qk'].pairs))
        step = model.qk.left_quantizer.scale
        assert (step > 0.2).all() and (step < 0.5).all()  # of values from -3 to 3, not to 8
    assert (errors[1] < errors[0]).all()


def test_other_methods_leave_elements_alone():
    scales = [calibrated(method)[0].left_quantizer.scale for method in ('mse', 'output')]
    assert not torch.equal(*scales)
    matmul, seen = calibrated('mse')
    found = matmul.left_quantizer.scale.clone()
    refine_products(nn.ModuleDict(dict(av=matmul)), {'av': ProductSample()}, 2)
    assert torch.equal(matmul.left_quantizer.scale, found) and len(seen.products['av'].entries) == 3


def test_an_operand_that_no_data_reached_is_left_alone():
    weights, values = attention()
    weights.zero_()  # heads that attend to nothing
    model = nn.ModuleDict(dict(av=QuantMatmul(POWERS, STEPS, HEADS)))
    with observe(model) as seen:
        model.av(weights, values)
    assert calibrate(model, seen) == ['av.left_quantizer']
    assert not model.av.left_quantizer.calibrated and model.av.right_quantizer.calibrated
