"""Scale search: never worse than where it starts, and harmless on degenerate data."""
import pytest
import torch

from pfcr_mm.errors import UsageError
from pfcr_mm.quantizers import QuantizerSpec, build_quantizer, search
from pfcr_mm.quantizers import functional as F

METHODS = ('minmax', 'percentile', 'mse')
SYMMETRIC = pytest.mark.parametrize('symmetric', [False, True], ids=['affine', 'symmetric'])


def quantize(x, scale, zero, spec):
    if scale.dim():
        scale, zero = scale.view(-1, *[1] * (x.dim() - 1)), zero.view(-1, *[1] * (x.dim() - 1))
    codes = F.uniform_encode(x, scale, zero, *F.uniform_code_range(spec.bits, spec.symmetric))
    return F.uniform_decode(codes, scale, zero)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def heavy_tailed(*shape, seed=0):
    x = torch.randn(shape, generator=seeded(seed))
    return x * x.abs() + 0.2


@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
@SYMMETRIC
def test_mse_is_no_worse_than_minmax(bits, symmetric):
    spec = QuantizerSpec(bits=bits, symmetric=symmetric)
    x = heavy_tailed(6, 2000)
    errors = [(quantize(x, *search.search_range(x, spec, method), spec) - x).square().mean(1)
              for method in ('mse', 'minmax')]
    assert (errors[0] <= errors[1]).all()
    if bits <= 4:
        assert (errors[0] < 0.8 * errors[1]).all()  # tails must have been cut


@pytest.mark.parametrize('method', METHODS)
@SYMMETRIC
def test_vectorised_equals_a_loop_over_channels(method, symmetric):
    spec = QuantizerSpec(bits=4, symmetric=symmetric)
    x = heavy_tailed(8, 500) * torch.logspace(-3, 2, 8)[:, None]
    scale, zero = search.search_range(x, spec, method)
    for i in range(8):
        one_scale, one_zero = search.search_range(x[i:i + 1], spec, method)
        torch.testing.assert_close(one_scale[0], scale[i])
        assert one_zero[0] == zero[i]


def test_log_search_equals_a_loop_over_heads():
    x = torch.softmax(heavy_tailed(4, 300, 20) * 2, -1).flatten(1)
    spec = QuantizerSpec(kind='log2', bits=3)
    scales = search.search_log_grid(x, spec, 1)[0]
    assert torch.equal(scales, torch.cat([
        search.search_log_grid(x[i:i + 1], spec, 1)[0] for i in range(4)]))


def test_log_search_is_no_worse_than_the_largest_value():
    x = torch.softmax(heavy_tailed(4, 300, 49), -1).flatten(1)
    spec = QuantizerSpec(kind='log_sqrt2', bits=3)

    def error(scale):
        codes = F.log_encode(x, scale[:, None], 3, 2, True)
        return (F.log_decode(codes, scale[:, None], 3, 2, True) - x).square().mean(1)

    assert (error(search.search_log_grid(x, spec, 2)[0]) < error(x.amax(1))).all()


def on_log_grid(x, scale, steps, spec):
    rest = spec.bits, steps, spec.zero_below
    return F.log_decode(F.log_encode(x, scale, *rest), scale, *rest)


@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
def test_the_search_of_a_base_finds_it(bits):
    """Values on a grid of powers of 1.6 come back almost as they were."""
    spec = QuantizerSpec(kind='adalog', bits=bits)
    steps = 1 / torch.tensor(1.6).log2()
    codes = torch.randint(0, 2**min(bits, 4) - 1, (3, 4000), generator=seeded(bits))
    x = torch.exp2(-codes / steps) * torch.tensor([[0.1], [1.0], [30.0]])
    scale, found = search.search_log_grid(x, spec)
    error = (on_log_grid(x, scale[:, None], found[:, None], spec) - x).square().mean(1)
    assert (error < 0.02 * x.var(1)).all()


def test_the_search_of_a_base_equals_a_loop_over_heads():
    x = torch.softmax(heavy_tailed(4, 300, 20) * 2, -1).flatten(1)
    spec = QuantizerSpec(kind='adalog', bits=3)
    scale, steps = search.search_log_grid(x, spec)
    for i in range(4):
        one = search.search_log_grid(x[i:i + 1], spec)
        assert torch.equal(torch.stack(one)[:, 0], torch.stack([scale[i], steps[i]]))


def test_a_base_is_better_than_powers_of_two():
    x = torch.softmax(heavy_tailed(4, 300, 49), -1).flatten(1)
    spec = QuantizerSpec(kind='adalog', bits=3)
    scale, steps = search.search_log_grid(x, spec)
    ours = on_log_grid(x, scale[:, None], steps[:, None], spec)
    plain = on_log_grid(x, search.search_log_grid(x, spec, 1)[0][:, None], 1, spec)
    assert ((ours - x).square().mean(1) <= (plain - x).square().mean(1)).all()


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_refine_log_grid_is_no_worse_on_the_output(bits):
    """One huge value of one token must not decide: errors count by channel variance."""
    spec = QuantizerSpec(kind='adalog', bits=bits, shift=0.17)
    inputs = torch.nn.functional.gelu(torch.randn(400, 40, generator=seeded(0))) + 0.17
    inputs[7, 3] = 200.0
    weight = heavy_tailed(12, 40, seed=1)
    start = torch.tensor([300.0]), torch.tensor([2.0])
    found = search.refine_log_grid(inputs, weight, *start, spec)
    deviation = (inputs @ weight.t()).std(0)

    def cost(scale, steps):
        error = (on_log_grid(inputs, scale, steps, spec) - inputs) @ weight.t()
        return (error / deviation).square().sum().item()

    assert cost(*found) < cost(*start)
    spread = cost(*found) / weight.shape[0] / len(inputs)
    assert spread < {2: 0.6, 3: 0.15, 4: 0.03, 8: 0.001}[bits]


def test_refine_log_grid_keeps_what_it_cannot_judge():
    spec = QuantizerSpec(kind='adalog')
    start = torch.tensor([1.0]), torch.tensor([2.0])
    assert search.refine_log_grid(torch.ones(5, 3), torch.rand(2, 3), *start, spec) == start


@pytest.mark.parametrize('kind', ['log2', 'adalog'])
def test_all_zero_values_are_harmless(kind):
    quantizer = build_quantizer(dict(kind=kind, bits=4))
    quantizer.calibrate(torch.zeros(1, 10), 'mse')
    assert quantizer.calibrated and quantizer.fake_quantize(torch.zeros(3)).abs().max() < 1e-6


@pytest.mark.parametrize('method', METHODS)
@SYMMETRIC
@pytest.mark.parametrize('value', [0.0, 3.0, -0.02])
def test_constant_channel(method, symmetric, value):
    spec = QuantizerSpec(bits=4, symmetric=symmetric)
    x = torch.stack([torch.full((100, ), value), torch.linspace(-1, 1, 100)])
    scale, zero = search.search_range(x, spec, method)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.equal(zero, zero.round())
    # relative to the value half a step of 4 bits is the most that may be lost
    assert (quantize(x, scale, zero, spec)[0] - value).abs().max() <= abs(value) / 15 + 1e-7


def test_all_zero_log_channel():
    scale = search.search_log_grid(
        torch.zeros(2, 10), QuantizerSpec(kind='log2', bits=4), 1)[0]
    assert (scale > 0).all() and torch.isfinite(scale).all()


@pytest.mark.parametrize('method', METHODS)
def test_zero_points_are_integer_codes(method):
    spec = QuantizerSpec(bits=3)
    x = heavy_tailed(20, 300) + torch.linspace(-9, 9, 20)[:, None]
    zero = search.search_range(x, spec, method)[1]
    assert torch.equal(zero, zero.round()) and zero.min() >= 0 and zero.max() <= 7


def test_true_extremes_are_used():
    x, spec = torch.linspace(-1, 1, 50)[None], QuantizerSpec(bits=4)
    scale, _ = search.search_range(x, spec, 'minmax', (torch.tensor([-10.]), torch.tensor([5.])))
    assert scale.item() == pytest.approx(1)


def test_unknown_method():
    with pytest.raises(UsageError, match="method='best'"):
        search.search_range(torch.rand(1, 9), QuantizerSpec(), 'best')


def test_quantile_by_hand():
    low, high = search.quantile_range(torch.arange(101.).expand(2, -1), 0.9)
    assert low.tolist() == pytest.approx([10, 10]) and high.tolist() == pytest.approx([90, 90])


def test_quantile_of_more_than_16_million_values():
    x = torch.arange(2**24 + 16, dtype=torch.float32)[None]
    with pytest.raises(RuntimeError, match='too large'):
        torch.quantile(x, 0.5)
    low, high = search.quantile_range(x, 0.99)
    assert low.item() / 2**24 == pytest.approx(0.01, abs=1e-3)
    assert high.item() / 2**24 == pytest.approx(0.99, abs=1e-3)


@SYMMETRIC
@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('samples', [20, 400], ids=['few-rows', 'many-rows'])
@pytest.mark.parametrize('start', ['minmax', 'mse'])
def test_refine_weight_is_no_worse_on_the_output(symmetric, bits, samples, start):
    spec = QuantizerSpec(bits=bits, symmetric=symmetric)
    weight, inputs = heavy_tailed(12, 40), heavy_tailed(samples, 40, seed=1)
    before = search.search_range(weight, spec, start)
    after = search.refine_weight(weight, *before, spec, inputs)

    def cost(scales):
        error = quantize(weight, *scales, spec) - weight
        return (inputs @ error.t()).square().sum(0)

    assert (cost(after) <= cost(before) * (1 + 1e-4)).all()
    assert cost(after).sum() < cost(before).sum()


def test_refine_weight_with_several_rows_a_channel():
    """A transposed convolution has one row a kernel tap, and one scale a channel."""
    spec = QuantizerSpec(bits=3)
    weight, inputs = heavy_tailed(6 * 4, 10), heavy_tailed(300, 10, seed=1)
    before = search.search_range(weight.view(6, 40), spec, 'minmax')
    after = search.refine_weight(weight, *before, spec, inputs, groups=6)
    assert after[0].shape == (6, )

    def cost(scales):
        error = (quantize(weight.view(6, 40), *scales, spec).view(24, 10) - weight)
        return (inputs @ error.t()).square().sum(0).view(6, 4).sum(1)

    assert (cost(after) <= cost(before) * (1 + 1e-4)).all()


@SYMMETRIC
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('start', ['minmax', 'mse', 'percentile'])
@pytest.mark.parametrize('seed', range(3))
def test_refine_activation_is_no_worse_on_the_output(symmetric, bits, start, seed):
    spec = QuantizerSpec(bits=bits, symmetric=symmetric)
    inputs, weight = heavy_tailed(200, 16, seed=seed), heavy_tailed(8, 16, seed=seed + 9)
    before = search.search_range(inputs.view(1, -1), spec, start)
    after = search.refine_activation(inputs, weight, *before, spec)

    variance = (inputs @ weight.t()).var(0, correction=0)

    def cost(scales):
        error = (quantize(inputs, *(s[0] for s in scales), spec) - inputs) @ weight.t()
        return (error.square() / variance).sum()

    assert cost(after) <= cost(before) * (1 + 1e-4)


def test_a_negative_tail_gets_a_code_back():
    """By squared error GELU's values above -0.17 round to zero, though they are half of all."""
    spec = QuantizerSpec(bits=4)
    inputs = torch.nn.functional.gelu(torch.randn(800, 16, generator=seeded(0)))
    weight = torch.rand(8, 16, generator=seeded(1))  # all of one sign: the errors add up
    start = torch.tensor([0.25]), torch.tensor([0.0])
    _, zero_point = search.refine_activation(inputs, weight, *start, spec)
    assert zero_point.item() >= 1


def test_one_massive_value_does_not_decide():
    """One neuron of one token at 200, as ViTs have: the step stays that of the others."""
    spec = QuantizerSpec(bits=4)
    inputs = torch.randn(500, 16, generator=seeded(0))
    weight = torch.randn(32, 16, generator=seeded(1))
    weight[:, 0] *= torch.arange(32) == 0  # the neuron is read by one channel alone
    inputs[7, 0] = 200.0
    start = search.search_range(inputs.view(1, -1), spec, 'minmax')
    scale, _ = search.refine_activation(inputs, weight, *start, spec)
    assert start[0].item() > 10
    assert scale.item() < 1


@pytest.mark.parametrize('kind', ['uniform', 'adalog'])
def test_again_looks_near_alone(kind):
    """From where a search ended it finds the same or a near grid; from far away no other."""
    spec = QuantizerSpec(kind=kind, bits=4)
    inputs = torch.rand(300, 16, generator=seeded(0)).square()
    weight = torch.randn(8, 16, generator=seeded(1))
    refine = search.refine_activation if kind == 'uniform' else search.refine_log_grid
    far = torch.tensor([50.0]), torch.tensor([1.0])
    options = {} if kind == 'uniform' else dict(steps_per_octave=None)
    found = refine(inputs, weight, *far, spec, **options)
    twice = refine(inputs, weight, *found, spec, **options)
    again = refine(inputs, weight, *found, spec, **options, again=True)
    for whole, near in zip(twice, again):
        torch.testing.assert_close(near, whole)
    assert found[0] < 5 < refine(inputs, weight, *far, spec, **options, again=True)[0]


@pytest.mark.parametrize('rows', [torch.ones(1, 4), torch.zeros(9, 4)], ids=['one', 'zeros'])
def test_rows_that_tell_nothing_change_nothing(rows):
    start = torch.tensor([0.1]), torch.tensor([3.0])
    assert search.refine_activation(rows, torch.ones(2, 4), *start, QuantizerSpec(bits=4)) == start


def test_affine_fit_finds_a_grid_that_lies_anywhere():
    """By hand: 8 levels 0.3 apart from 0.137 on, the other channel far from zero."""
    spec, codes = QuantizerSpec(bits=3, granularity='channel'), torch.arange(8.).repeat(40)
    samples = torch.stack([0.3 * codes + 0.137, 0.02 * codes - 7.31])
    start = search.search_range(samples, spec, 'mse')
    scale, zero = search.fit_affine(samples, torch.ones(320), *start, spec)
    torch.testing.assert_close(scale, torch.tensor([0.3, 0.02]), rtol=1e-3, atol=0)
    torch.testing.assert_close(-zero * scale, torch.tensor([0.137, -7.31]), rtol=1e-3, atol=0)


def test_affine_fit_is_no_worse_than_its_start():
    spec, samples = QuantizerSpec(bits=3, granularity='channel'), heavy_tailed(6, 500)
    weights = torch.rand(500, generator=seeded(1))

    def error(scale, zero):
        codes = (samples / scale[:, None] + zero[:, None]).round().clamp(0, 7)
        return ((codes - zero[:, None]) * scale[:, None] - samples).square() @ weights

    start = search.search_range(samples, spec, 'mse')
    found = search.fit_affine(samples, weights, *start, spec)
    assert (error(*found) <= error(*start)).all()
    assert (error(*found) / error(*start)).mean() < 0.95


def test_affine_fit_counts_samples_by_their_weights():
    """One class token far out among a hundred patches is clipped, unless it counts."""
    spec, samples = QuantizerSpec(bits=3, granularity='channel'), heavy_tailed(1, 101).clamp(-2, 2)
    samples[0, 0] = 9.0
    start, far = search.search_range(samples[:, 1:], spec, 'mse'), []
    for weight in (0.0, 50.0):
        weights = torch.ones(101)
        weights[0] = weight
        scale, zero = search.fit_affine(samples, weights, *start, spec)
        far.append((scale * (7 - zero)).item())
    assert far[0] < 4 and 8 < far[1] < 10


@pytest.mark.parametrize('value', [0.0, 3.5])
def test_affine_fit_of_a_constant_channel_is_finite(value):
    spec, samples = QuantizerSpec(bits=4, granularity='channel'), torch.full((2, 30), value)
    start = torch.tensor([0.1, 1e-8]), torch.tensor([3.0, 0.0])
    scale, zero = search.fit_affine(samples, torch.ones(30), *start, spec)
    assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(zero).all()
