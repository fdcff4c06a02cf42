"""Closed forms for weights: by hand, against solvers, and never worse than rounding."""
import pytest
import torch

from pfcr_mm.quantizers import QuantizerSpec, search
from pfcr_mm.quantizers import functional as F
from pfcr_mm.quantizers.least_squares import compensate, feed_back, feed_back_scaled


def correlated(samples, fan_in, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(fan_in, fan_in, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, fan_in, generator=generator, dtype=torch.float64)
    return x @ mix * torch.logspace(0, 1, fan_in, dtype=torch.float64)


def weight_of(rows, fan_in, seed=1):
    return torch.randn(
        rows, fan_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded(weight, scale, zero_point, spec):
    codes = F.uniform_encode(weight, scale[:, None], zero_point[:, None],
                             *F.uniform_code_range(spec.bits, spec.symmetric))
    return F.uniform_decode(codes, scale[:, None], zero_point[:, None])


def test_compensate_by_hand():
    # x = 1, 2, x^ = 2, 4: half the weight says the same; lambda = 10 = E[x^ x^] keeps half of it
    gram, cross = torch.tensor([[10.0]]).double(), torch.tensor([[5.0]]).double()
    weight = torch.tensor([[4.0]])
    assert compensate(weight, gram, cross, 1e-9).item() == pytest.approx(2)
    assert compensate(weight, gram, cross, 1.0).item() == pytest.approx(3)


def test_compensate_is_ridge_regression():
    x, weight = correlated(300, 6), weight_of(4, 6)
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    gram, cross = noisy.t() @ noisy / 300, x.t() @ noisy / 300
    found = compensate(weight, gram, cross, 0.05)
    penalty = (0.05 * gram.diagonal().mean() * 300).sqrt()
    stacked = torch.cat([noisy, penalty * torch.eye(6).double()])
    wanted = torch.cat([x @ weight.t(), penalty * weight.t()])
    torch.testing.assert_close(found, torch.linalg.lstsq(stacked, wanted).solution.t())


def test_nothing_to_make_up_for():
    x, weight = correlated(300, 6), weight_of(4, 6)
    gram = x.t() @ x / 300
    torch.testing.assert_close(compensate(weight, gram, gram, 0.01), weight)


def test_feed_back_by_hand():
    """Inputs that are equal: what the first column loses the second makes up for."""
    spec = QuantizerSpec(bits=4, symmetric=True, granularity='channel')
    gram = torch.tensor([[1.01, 1.0], [1.0, 1.0]]).double()
    weight = torch.tensor([[0.4, 0.4]])
    found = feed_back(weight, torch.ones(1), torch.zeros(1), spec, gram, damping=1e-6)
    assert found[0, 0].item() == pytest.approx(0.4)  # rounds to 0: 0.4 too little
    assert found[0, 1].item() == pytest.approx(0.8, abs=0.01)  # rounds to 1
    assert rounded(found, torch.ones(1).double(), torch.zeros(1).double(), spec).tolist() == [
        [0, 1]]


@pytest.mark.parametrize('symmetric', [False, True], ids=['affine', 'symmetric'])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('fan_in', [5, 64, 150], ids=str)
def test_feed_back_has_less_error_of_the_output(bits, symmetric, fan_in):
    spec = QuantizerSpec(bits=bits, symmetric=symmetric, granularity='channel')
    x, weight = correlated(2000, fan_in), weight_of(12, fan_in)
    gram = x.t() @ x / 2000
    scale, zero_point = (v.double() for v in search.search_range(weight.float(), spec))
    before, after = (
        ((rounded(w, scale, zero_point, spec) - weight) @ x.t()).square().mean(1)
        for w in (weight, feed_back(weight, scale, zero_point, spec, gram)))
    assert (after <= before * (1 + 1e-9)).all()
    assert after.sum() < (0.9 if fan_in == 5 else 0.8) * before.sum()


def test_feed_back_equals_the_loop_of_the_paper():
    """Blocks are for speed: column by column over all that follows is the same."""
    spec = QuantizerSpec(bits=3, granularity='channel')
    x, weight = correlated(2000, 150), weight_of(7, 150)
    gram = x.t() @ x / 2000
    scale, zero_point = (v.double() for v in search.search_range(weight.float(), spec))
    order = gram.diagonal().argsort(descending=True, stable=True)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(150).double()
    inverse = damped[order][:, order].inverse()
    rest, found = weight[:, order].clone(), torch.empty_like(weight)
    for i in range(150):
        found[:, i] = rest[:, i]
        loss = rest[:, i] - rounded(rest[:, i:i + 1], scale, zero_point, spec)[:, 0]
        rest = rest - loss[:, None] * inverse[i] / inverse[i, i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    expected = torch.empty_like(found)
    expected[:, order] = found
    ours = feed_back(weight, scale, zero_point, spec, gram)
    codes = [rounded(w, scale, zero_point, spec) for w in (ours, expected)]
    assert (codes[0] == codes[1]).double().mean() > 0.99
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shared', [1, 3])
def test_scales_for_fed_back_errors(shared):
    """Of nine multiples the best of each scale, whether a row has it alone or not."""
    spec = QuantizerSpec(bits=3, granularity='channel')
    x, weight = correlated(2000, 48), weight_of(12, 48)
    gram = x.t() @ x / 2000
    scale, zero_point = (v.double() for v in search.search_range(
        weight.view(12 // shared, -1).float(), spec))

    def loss(moved, scale):
        wide = [v.repeat_interleave(shared) for v in (scale, zero_point)]
        error = (rounded(moved, *wide, spec) - weight) @ x.t()
        return error.square().mean(1).view(-1, shared).sum(1)

    moved, found = feed_back_scaled(weight, scale, zero_point, spec, gram)
    ratios = torch.tensor([1.0, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1]).double()
    losses = torch.stack([
        loss(feed_back(weight, *(v.repeat_interleave(shared) for v in (r * scale, zero_point)),
                       spec, gram), r * scale) for r in ratios])
    torch.testing.assert_close(found, ratios[losses.argmin(0)] * scale)
    torch.testing.assert_close(loss(moved, found), losses.amin(0), rtol=1e-5, atol=0)
    assert losses.amin(0).sum() < 0.99 * losses[0].sum()


def test_inputs_that_are_always_zero_are_harmless():
    spec = QuantizerSpec(bits=4, granularity='channel')
    weight, gram = weight_of(3, 4), torch.zeros(4, 4).double()
    gram[0, 0] = 1.0
    scale, zero_point = search.search_range(weight.float(), spec)
    for zero in (gram, gram * 0):
        assert torch.isfinite(feed_back(weight, scale, zero_point, spec, zero)).all()
        assert torch.isfinite(compensate(weight, zero, zero, 0.01)).all()
