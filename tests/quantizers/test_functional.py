"""Quantizer maths against values computed by hand, and gradients against autograd."""
import pytest
import torch

from pfcr_mm.benchmark import reference as straight
from pfcr_mm.quantizers import functional as F

BITS = range(2, 9)


def t(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def uniform(x, scale, zero_point, low, high):
    return F.uniform_decode(F.uniform_encode(x, scale, zero_point, low, high), scale, zero_point)


def log(x, scale, bits, steps, zero_below):
    return F.log_decode(F.log_encode(x, scale, bits, steps, zero_below), scale, bits, steps,
                        zero_below)


@pytest.mark.parametrize('bits, affine, symmetric', [
    (2, (0, 3), (-2, 1)), (3, (0, 7), (-4, 3)), (4, (0, 15), (-8, 7)), (5, (0, 31), (-16, 15)),
    (6, (0, 63), (-32, 31)), (7, (0, 127), (-64, 63)), (8, (0, 255), (-128, 127))])
def test_code_ranges(bits, affine, symmetric):
    assert F.uniform_code_range(bits, False) == affine
    assert F.uniform_code_range(bits, True) == symmetric


def test_uniform_affine_2_bits_by_hand():
    x = t(-2, -0.3, -0.2, 0.1, 0.3, 0.74, 0.76, 9)
    codes = F.uniform_encode(x, t(0.5), t(1), 0, 3)
    assert codes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert F.uniform_decode(codes, t(0.5), t(1)).tolist() == [-.5, -.5, 0, 0, .5, .5, 1, 1]


def test_uniform_symmetric_3_bits_by_hand():
    x = t(-7, -0.88, -0.87, -0.1, 0, 0.13, 0.6, 0.7, 5)
    codes = F.uniform_encode(x, t(0.25), t(0), -4, 3)
    assert codes.tolist() == [-4, -4, -3, 0, 0, 1, 2, 3, 3]
    assert F.uniform_decode(codes, t(0.25), t(0))[[0, -1]].tolist() == [-1, 0.75]


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('symmetric', [False, True], ids=['affine', 'symmetric'])
def test_uniform_table(bits, symmetric):
    """Every code decodes to (code - z) * s, and encodes back."""
    low, high = F.uniform_code_range(bits, symmetric)
    zero_point = t(0) if symmetric else t(high // 3)
    codes = torch.arange(low, high + 1, dtype=torch.float64)
    values = F.uniform_decode(codes, t(0.125), zero_point)
    assert values.tolist() == [(c - zero_point.item()) / 8 for c in range(low, high + 1)]
    assert torch.equal(F.uniform_encode(values, t(0.125), zero_point, low, high), codes)


def test_rounding_is_half_to_even():
    assert F.uniform_encode(t(0.5, 1.5, 2.5), t(1), t(0), 0, 7).tolist() == [0, 2, 2]


@pytest.mark.parametrize('low, high, bits, scale, zero', [
    (-1, 2, 2, 1, 1), (-3, 12, 4, 1, 3), (1, 4.5, 2, 1.5, 0), (-6, -1, 2, 2, 3), (0, 0, 4, 1e-8, 0),
], ids=['mixed', 'four-bits', 'positive', 'negative', 'all-zero'])
def test_affine_from_range_by_hand(low, high, bits, scale, zero):
    found = F.affine_from_range(t(low), t(high), bits)
    assert found[0].item() == pytest.approx(scale)
    assert found[1].item() == zero


def test_symmetric_from_range_by_hand():
    scale, zero = F.affine_from_range(t(-15, -1), t(3, 7.5), 4, symmetric=True)
    assert scale.tolist() == [2, 1] and zero.tolist() == [0, 0]


def test_log2_3_bits_by_hand():
    x = t(3, 1, 0.8, 0.7, 0.36, 0.35, 2**-6, 0.011, 2**-7, 1e-30, 0)
    codes = F.log_encode(x, t(1), 3, 1, True)
    assert codes.tolist() == [0, 0, 0, 1, 1, 2, 6, 6, 7, 7, 7]
    assert F.log_decode(codes, t(1), 3, 1, True).tolist() == [
        1, 1, 1, .5, .5, .25, 2**-6, 2**-6, 0, 0, 0]


def test_log2_saturates_without_zero():
    x = t(1, 2**-7, 1e-30, 0)
    assert log(x, t(1), 3, 1, False).tolist() == [1, 2**-7, 2**-7, 2**-7]


def test_log_sqrt2_2_bits_by_hand():
    # powers 1, 2^-0.5, 2^-1; zero at or below 2^-1.5 = 0.35355
    x = t(2, 0.85, 0.84, 0.6, 0.59, 0.36, 0.35)
    assert F.log_encode(x, t(1), 2, 2, True).tolist() == [0, 0, 1, 1, 2, 2, 3]
    values = log(x, t(4), 2, 2, True)  # x / scale is 0.5 and below
    assert values.tolist() == pytest.approx([2, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('steps', [1, 2], ids=['log2', 'log_sqrt2'])
def test_log_table(bits, steps):
    """Every code decodes to s * 2^(-code / steps), the last to zero, and encodes back."""
    last = 2**bits - 1
    codes = torch.arange(last + 1, dtype=torch.float64)
    values = F.log_decode(codes, t(0.7), bits, steps, True)
    assert values.tolist() == pytest.approx([0.7 * 2**(-c / steps) for c in range(last)] + [0],
                                            rel=1e-9, abs=0)
    assert torch.equal(F.log_encode(values, t(0.7), bits, steps, True), codes)


def dense(kind, bits):
    """Float64 values that come near every level, and beyond both ends."""
    if kind == 'log':
        return torch.cat([torch.exp2(torch.linspace(2, -2.0**bits - 8, 200_001,
                                                    dtype=torch.float64)), t(0)])
    return torch.linspace(-3, 3, 200_001, dtype=torch.float64)


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('symmetric', [False, True], ids=['affine', 'symmetric'])
def test_uniform_has_exactly_2_to_the_bits_levels(bits, symmetric):
    scale, zero = F.affine_from_range(t(-1.3), t(2.1), bits, symmetric)
    values = uniform(dense('uniform', bits), scale, zero, *F.uniform_code_range(bits, symmetric))
    assert values.unique().numel() == 2**bits


@pytest.mark.parametrize('zero_below', [True, False], ids=['zero', 'saturate'])
@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('steps', [1, 2], ids=['log2', 'log_sqrt2'])
def test_log_has_exactly_2_to_the_bits_levels(bits, steps, zero_below):
    values = log(dense('log', bits), t(0.9), bits, steps, zero_below)
    # float64 exp2 may differ in the last place between vector and scalar code
    assert values.log2().mul(1e6).round().unique().numel() == 2**bits


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('steps', [1, 2], ids=['log2', 'log_sqrt2'])
def test_log_keeps_zero_in_float32(bits, steps):
    x = torch.tensor([0.0, 1.0])
    assert log(x, torch.tensor([1.0]), bits, steps, True).tolist() == [0, 1]


# --- gradients ---------------------------------------------------------------

def gradients(function, x, scale, *args):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    out = function(x, scale, *args)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    return out.detach(), x.grad, scale.grad


def test_uniform_gradients_by_hand():
    # ratio 0.6 rounds to 1; the others are clipped to codes 3 and 0, zero point 1
    x, scale = t(0.3, 9, -2).requires_grad_(), t(0.5).requires_grad_()
    out = F.UniformFakeQuantize.apply(x, scale, t(1), 0, 3)
    assert out.tolist() == [0.5, 1, -0.5]
    out[0].backward(retain_graph=True)
    assert scale.grad.item() == pytest.approx(1 - 0.6)
    assert x.grad.tolist() == [1, 0, 0]
    x.grad = scale.grad = None
    (out * t(0, 1, 10)).sum().backward()
    assert scale.grad.item() == 2 * 1 + 10 * -1
    assert x.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('symmetric', [False, True], ids=['affine', 'symmetric'])
@pytest.mark.parametrize('shape', [(1, 1), (5, 1), (1, 300)], ids=['tensor', 'rows', 'columns'])
def test_uniform_gradients_equal_autograd(bits, symmetric, shape):
    x = torch.randn(5, 300, dtype=torch.float64) * 2
    scale = torch.rand(shape, dtype=torch.float64) * 0.4 / 2**bits * 8 + 0.01
    low, high = F.uniform_code_range(bits, symmetric)
    zero = torch.zeros(shape, dtype=torch.float64) + (0 if symmetric else high // 2)
    got = gradients(F.UniformFakeQuantize.apply, x, scale, zero, low, high)
    want = gradients(straight.uniform, x, scale, zero, low, high)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    assert 0 < (got[1] == 0).sum() < x.numel()  # some were clipped, some not


def test_log2_gradients_by_hand():
    # 0.7 -> 0.5: slope 0.5 / 0.7; above the scale only the scale moves; zeroed: nothing
    x, scale = t(0.7, 2, 0.001).requires_grad_(), t(1).requires_grad_()
    out = F.LogFakeQuantize.apply(x, scale, 3, 1, True)
    assert out.tolist() == [0.5, 1, 0]
    out.sum().backward()
    assert x.grad.tolist() == pytest.approx([0.5 / 0.7, 0, 0])
    assert scale.grad.item() == pytest.approx(1)


@pytest.mark.parametrize('zero_below', [True, False], ids=['zero', 'saturate'])
@pytest.mark.parametrize('steps', [1, 2], ids=['log2', 'log_sqrt2'])
@pytest.mark.parametrize('bits', [2, 3, 4])
def test_log_gradients_equal_autograd(bits, steps, zero_below):
    x = torch.exp2(-torch.rand(4, 500, dtype=torch.float64) * (2**bits + 3) + 1)
    scale = t(0.5, 0.8, 1, 1.3).view(4, 1)
    got = gradients(F.LogFakeQuantize.apply, x, scale, bits, steps, zero_below)
    want = gradients(straight.logarithmic, x, scale, bits, steps, zero_below)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_log_gradients_are_finite_at_zero():
    x = torch.tensor([0.0, 1e-45, 1.0], requires_grad=True)
    scale = torch.tensor([1.0], requires_grad=True)
    for bits in BITS:
        for zero_below in (True, False):
            F.LogFakeQuantize.apply(x, scale, bits, 1, zero_below).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(scale.grad).all()


# --- any base, shifted -------------------------------------------------------

def shifted(x, scale, bits, steps, zero_below, shift):
    """`straight.logarithmic` with the arguments of `LogFakeQuantize`."""
    return straight.logarithmic(x + shift, scale, bits, steps, zero_below) - shift


def test_adalog_by_hand():
    # base 4 (half a step an octave), shifted by one: 4, 1, 1/4 or zero, less one
    x = t(5, 3, 1.1, 0.9, -0.4, -0.6, -0.88, -0.95, -1, -3)
    out = F.LogFakeQuantize.apply(x, t(4), 2, t(0.5), True, 1.0)
    assert out.tolist() == [3, 3, 3, 0, 0, -0.75, -0.75, -1, -1, -1]


def test_adalog_gradients_by_hand():
    # 1.1 -> 3: 4 / 2.1; 5 is clipped: the scale alone moves; -0.95 is zeroed
    x, scale = t(1.1, 5, -0.95).requires_grad_(), t(4).requires_grad_()
    F.LogFakeQuantize.apply(x, scale, 2, t(0.5), True, 1.0).sum().backward()
    assert x.grad.tolist() == pytest.approx([4 / 2.1, 0, 0])
    assert scale.grad.item() == pytest.approx(1)


@pytest.mark.parametrize('zero_below', [True, False], ids=['zero', 'saturate'])
@pytest.mark.parametrize('shift', [0.0, 0.17])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_adalog_gradients_equal_autograd(bits, shift, zero_below):
    x = torch.randn(4, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    x = torch.nn.functional.gelu(x * 2) if shift else x.abs()
    scale, steps = t(0.5, 1, 2, 3).view(4, 1), t(0.7, 1.3, 2.2, 3.1).view(4, 1)
    got = gradients(F.LogFakeQuantize.apply, x, scale, bits, steps, zero_below, shift)
    want = gradients(shifted, x, scale, bits, steps, zero_below, shift)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    assert 0 < (got[1] == 0).sum() < x.numel()


@pytest.mark.parametrize('steps', [1, 2], ids=['log2', 'log_sqrt2'])
def test_adalog_of_a_known_base(steps):
    x = torch.rand(1000, dtype=torch.float64)**6
    got = F.LogFakeQuantize.apply(x, t(0.8), 4, t(steps), True)
    torch.testing.assert_close(got, F.LogFakeQuantize.apply(x, t(0.8), 4, steps, True))
