"""Scales of matmuls' operands by the error of the product."""
import pytest
import torch
from torch import nn

from pfcr_mm.modules import QuantMatmul, set_quantization
from pfcr_mm.quantizers import QuantizerSpec
from pfcr_mm.reconstruction import calibrate, observe
from pfcr_mm.reconstruction.products import ProductSample, refine_products, some_rows

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
    right = torch.rand(9, HEADS, KEYS, 3, generator=seeded())
    some_left, some_right = some_rows(left, right, None, seeded())
    assert some_left.shape == (4, HEADS, 8, KEYS) and some_right.shape == (4, HEADS, KEYS, 3)
    windows = [next(i for i in range(9) if torch.equal(right[i], r)) for r in some_right]
    assert len(set(windows)) == 4
    for window, rows in zip(windows, some_left):
        for row in rows.unbind(1):
            assert any(torch.equal(row, one) for one in left[window].unbind(1))


def test_padding_is_not_looked_at():
    left = torch.arange(6.0).view(6, 1, 1, 1).expand(6, HEADS, 5, KEYS).clone()
    left[:, :, 3:] = -1
    valid = torch.tensor([[True] * 3 + [False] * 2, [False] * 5, [True] + [False] * 4])
    for seed in range(20):
        some, _ = some_rows(left, torch.ones(6, HEADS, KEYS, 3), valid, seeded(seed))
        assert set(some.unique().tolist()) == {0, 2, 3, 5}  # of two images' windows
    assert some_rows(left, left, torch.zeros(3, 5, dtype=torch.bool), seeded()) is None


def test_what_is_kept_does_not_depend_on_the_order():
    pairs = [(torch.full((1, HEADS, 4, 10), float(i)), torch.ones(1, HEADS, 10, 2))
             for i in range(30)]
    kept = []
    for order in (range(30), reversed(range(30))):
        sample = ProductSample(budget=6 * 120)
        for i in order:
            sample.add(*pairs[i], seeded(i))
        sample.settle()
        kept.append([left.unique().item() for left, _ in sample.pairs])
    assert kept[0] == kept[1] and len(kept[0]) == 6


def test_one_image_is_kept_however_large():
    sample = ProductSample(budget=10)
    for seed in (1, 2):
        sample.add(*attention(seed=seed), seeded(seed))
    assert len(sample.pairs) == 1


# --- what is found ---------------------------------------------------------------

def test_scales_are_those_of_least_error_by_hand():
    """All scales of a log2 grid tried one by one, in plain numbers."""
    weights, values = attention()
    sample = ProductSample()
    sample.add(weights, values, seeded())
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


@pytest.mark.parametrize('kind', ['log2', 'log_sqrt2', 'adalog', 'uniform'])
@pytest.mark.parametrize('granularity', ['head', 'tensor'])
def test_products_are_no_worse_than_elements_make_them(kind, granularity):
    left = QuantizerSpec(kind=kind, bits=4, granularity=granularity)
    pairs = [attention(seed=s) for s in (0, 2, 4)]
    errors = {method: product_error(calibrated(method, left)[0], pairs)
              for method in ('mse', 'output')}
    if granularity == 'tensor':
        errors = {method: error.sum() for method, error in errors.items()}
    assert (errors['output'] <= errors['mse'] * 1.05).all()  # it sees some of the rows


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
    errors = [product_error(calibrated(method, STEPS, STEPS, pairs)[0], pairs)
              for method in ('mse', 'output')]
    assert (errors[1] <= errors[0]).all() and (errors[1] < errors[0]).any()


def test_other_methods_leave_elements_alone():
    scales = [calibrated(method)[0].left_quantizer.scale for method in ('mse', 'output')]
    assert not torch.equal(*scales)
    matmul, seen = calibrated('mse')
    found = matmul.left_quantizer.scale.clone()
    refine_products(nn.ModuleDict(dict(av=matmul)), {'av': ProductSample()}, 2)
    assert torch.equal(matmul.left_quantizer.scale, found) and len(seen.products['av'].pairs) == 3
