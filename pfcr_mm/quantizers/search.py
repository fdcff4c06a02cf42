"""Scale search: from samples of a tensor to scales and zero points.

Samples come as (groups, n): one row per scale (1 for a tensor, channels, heads).
All searches are vectorised over groups.
"""
import torch

from ..errors import UsageError
from . import functional as F

PERCENTILES = (0.99, 0.999, 0.9999, 0.99999)
SHRINKS = torch.linspace(1.0, 0.3, 36).tolist()
WEIGHT_FACTORS = torch.linspace(0.5, 1.15, 27).tolist()
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
OCTAVES = (2.0**(-torch.arange(33) / 8)).tolist()
NEAR_FACTORS = torch.linspace(0.8, 1.25, 10).tolist()
_QUANTILE_LIMIT = 2**23  # torch.quantile fails above 2**24 elements


def search_range(samples, spec, method='mse', minmax=None):
    """Scales and zero points of a uniform quantizer.

    Args:
        samples (Tensor): (groups, n).
        spec (QuantizerSpec): bits and symmetry.
        method (str): 'minmax'; 'percentile' (RepQ-ViT: the best of a few upper and
            lower quantiles); 'mse' (shrink both ends together, then each alone).
        minmax (tuple[Tensor] | None): true extremes (groups,), where the samples
            are only a part of the data.

    Returns:
        tuple[Tensor, Tensor]: scale and zero point, each (groups,).
    """
    low, high = minmax if minmax is not None else (samples.amin(1), samples.amax(1))
    if method == 'minmax':
        return F.affine_from_range(low, high, spec.bits, spec.symmetric)
    if method == 'percentile':
        ranges = [quantile_range(samples, p) for p in PERCENTILES]
        return _best_range(samples, spec, ranges)[2:]
    if method != 'mse':
        raise UsageError(
            f"method={method!r} is not known; choose one of ['minmax', 'mse', 'percentile']")
    low, high, *_ = _best_range(samples, spec, [(low * f, high * f) for f in SHRINKS])
    steps = (1.2, 1.1, 1.05, 1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.25)
    low, high, *_ = _best_range(samples, spec, [(low * f, high) for f in steps])
    return _best_range(samples, spec, [(low, high * f) for f in steps])[2:]


def fit_affine(samples, weights, scale, zero_point, spec, steps=8):
    """Scale and real zero point of least squared error; the grid may lie far from zero.

    In turn the codes round(x / s + z), and by least squares s and z for these codes; from
    what is given and from several ranges, from all samples to their core.

    Args:
        samples (Tensor): (groups, n).
        weights (Tensor): how often each counts (n,).
        scale, zero_point (Tensor): (groups,) that a search found.
        spec (QuantizerSpec): bits and symmetry.
        steps (int): turns from each start.

    Returns:
        tuple[Tensor, Tensor]: scale and zero point, (groups,), no worse than those given.
    """
    low, high = F.uniform_code_range(spec.bits, spec.symmetric)
    least, most = samples.amin(1), samples.amax(1)
    middle = sum(quantile_range(samples, 0.98)) / 2

    def codes_of(scale, zero_point):
        return (samples / scale[:, None] + zero_point[:, None]).round().clamp(low, high)

    def error(scale, zero_point):
        values = (codes_of(scale, zero_point) - zero_point[:, None]) * scale[:, None]
        return (values - samples).square() @ weights

    def starts():
        yield scale, zero_point
        for share in _SHARES:
            width = (share * (most - least) / (high - low)).clamp(min=1e-8)
            yield width, low - (middle + share * (least - middle)) / width

    def candidates():
        yield scale, zero_point
        for found in starts():
            for _ in range(steps):
                found = _least_squares(samples, codes_of(*found), weights, *found)
            yield found

    return _best_of(candidates(), error)


def _least_squares(samples, codes, weights, scale, zero_point):
    """The scale and zero point that make most of `codes`; as they were where these are alike."""
    weights = weights / weights.sum()
    mean, mean_code = samples @ weights, codes @ weights
    codes = codes - mean_code[:, None]
    found = (codes * samples) @ weights / (codes.square() @ weights)
    usable = torch.isfinite(found) & (found > 0)
    found = torch.where(usable, found, scale)
    return found, torch.where(usable, mean_code - mean / found, zero_point)


def search_log_grid(samples, spec, steps_per_octave=None, minmax=None):
    """Scale and steps an octave of a logarithmic quantizer, by mean squared error.

    Args:
        samples (Tensor): (groups, n), not negative.
        steps_per_octave (float | None): None searches them too.
        minmax (tuple[Tensor] | None): true extremes (groups,).

    Returns:
        tuple[Tensor, Tensor]: scale and steps an octave, each (groups,).
    """
    top = (minmax[1] if minmax is not None else samples.amax(1)).clamp(min=1e-8)

    def error(scale, steps):
        values = _on_log_grid(samples, scale[:, None], steps[:, None], spec)
        return (values - samples).square().mean(1)

    return _best_of(log_grids(top, spec, steps_per_octave), error)


def log_grids(top, spec, steps_per_octave):
    """Candidates (scale, steps an octave), both like `top`.

    Where steps are given, scales go down to a 16th of `top`; else to a 64th, with less
    between them, and levels over 1 to 16 octaves.
    """
    if steps_per_octave is not None:
        return [(top * share, torch.full_like(top, steps_per_octave)) for share in OCTAVES]
    intervals = 2**spec.bits - 1 - spec.zero_below
    return [(top * 2.0**(-step / 2), torch.full_like(top, intervals / octaves))
            for step in range(13) for octaves in torch.linspace(0, 4, 17).exp2().tolist()]


def _on_log_grid(samples, scale, steps, spec):
    return F.kernels.log_values(samples, scale, steps, spec.bits, spec.zero_below, shift=0.0)


def on_uniform_grid(samples, scale, zero_point, spec):
    """Samples rounded to a quantizer's grid."""
    codes = F.uniform_encode(
        samples, scale, zero_point, *F.uniform_code_range(spec.bits, spec.symmetric))
    return F.uniform_decode(codes, scale, zero_point)


def _best_of(candidates, cost_of):
    """Of `candidates` the one of least cost, for each element; of equals the first.

    Args:
        candidates (Iterable[tuple[Tensor]]): tensors (groups,).
        cost_of (callable): takes a candidate's tensors, gives costs (groups,).
    """
    best = None
    for candidate in candidates:
        cost = cost_of(*candidate)
        if best is None:
            best, least = candidate, torch.full_like(cost, torch.inf)
        better = cost < least
        least = torch.where(better, cost, least)
        best = tuple(torch.where(better, new, old) for new, old in zip(candidate, best))
    return best


def quantile_range(samples, p):
    """Lower and upper p-quantiles per group, of at most 2**23 values."""
    samples = _at_most(samples, max(2, _QUANTILE_LIMIT // len(samples)))
    low, high = torch.quantile(samples, samples.new_tensor([1 - p, p]), dim=1)
    return low, high


def _at_most(samples, limit):
    """`limit` columns of samples (groups, n), evenly spread with both ends, or all."""
    count = samples.shape[1]
    if count <= limit:
        return samples
    # whole numbers: float32 cannot tell positions above 2**24 apart
    pick = torch.arange(limit, device=samples.device) * (count - 1) // (limit - 1)
    return samples[:, pick]


def refine_weight(weight, scale, zero_point, spec, inputs, groups=None):
    """Rescale weights to the least error of the layer's *output*.

    Args:
        weight (Tensor): rows (rows, fan_in), see `QuantLayer.weight_rows`.
        scale, zero_point (Tensor): (groups,) to start from.
        inputs (Tensor): sampled inputs as they arrive, quantized: (n, fan_in).
        groups (int | None): output channels where several rows share one scale.

    Returns:
        tuple[Tensor, Tensor]: scale and zero point, (groups,).
    """
    groups = groups or weight.shape[0]
    grouped = weight.reshape(groups, -1)
    gram = inputs.t() @ inputs if inputs.shape[0] > inputs.shape[1] else None

    def cost(scale, zero_point):
        error = on_uniform_grid(grouped, scale[:, None], zero_point[:, None], spec) - grouped
        error = error.reshape(weight.shape)
        if gram is None:
            cost = (error @ inputs.t()).square().sum(1)
        else:
            cost = ((error @ gram) * error).sum(1)
        return cost.reshape(groups, -1).sum(1)

    return _best_of(_rescaled(scale, zero_point, spec), cost)


def _rescaled(scale, zero_point, spec):
    """Candidates (scale, zero point) around a weight's."""
    low, high = F.uniform_code_range(spec.bits, spec.symmetric)
    middle = (low + high) / 2  # its real value stays where it was
    for factor in WEIGHT_FACTORS:
        yield scale * factor, zero_point if spec.symmetric else (
            middle - (middle - zero_point) / factor).round().clamp(low, high)


def refine_activation(inputs, weight, scale, zero_point, spec, again=False):
    """Search a per-tensor input quantizer for the least error of the layer's *output*.

    Args:
        inputs (Tensor): sampled inputs (n, fan_in), float.
        weight (Tensor): the weight in force (rows, fan_in).
        scale, zero_point (Tensor): shape (1,), what is in force.
        again (bool): what is in force was found so already: look near it alone.

    Returns:
        tuple[Tensor, Tensor]: scale and zero point, (1,).
    """
    low, high = F.uniform_code_range(spec.bits, spec.symmetric)

    def coarse():
        lows, widths = _ends_and_widths(inputs, high - low)
        for width in widths:
            zeros = (low - lows / width).round().clamp(low, high).unique().split(1)
            for zero in [zero_point] if spec.symmetric else zeros:
                yield width, zero

    return _refine_input(
        inputs, weight, lambda *grid: on_uniform_grid(inputs, *grid, spec),
        (scale, zero_point), () if again else coarse(), near_uniform(spec))


def refine_log_grid(inputs, weight, scale, steps, spec, steps_per_octave=None, again=False):
    """Search a per-tensor logarithmic input quantizer as `refine_activation` does.

    Args:
        inputs (Tensor): sampled inputs (n, fan_in), float, not negative.
        weight (Tensor): the weight in force (rows, fan_in).
        scale, steps (Tensor): scale and steps an octave in force, (1,).
        steps_per_octave (float | None): as for `search_log_grid`.
        again (bool): as for `refine_activation`.

    Returns:
        tuple[Tensor, Tensor]: scale and steps an octave, (1,).
    """
    coarse = () if again else log_grids(inputs.amax().view(1), spec, steps_per_octave)
    return _refine_input(
        inputs, weight, lambda *grid: _on_log_grid(inputs, *grid, spec), (scale, steps), coarse,
        near_log(steps_per_octave))


def uniform_grids(low, high, spec):
    """Candidates (scale, zero point) of uniform quantizers: ranges from all to a 16th.

    Args:
        low, high (Tensor): extremes (groups,).
        spec (QuantizerSpec): bits and symmetry.
    """
    for share in OCTAVES:
        yield F.affine_from_range(low * share, high * share, spec.bits, spec.symmetric)


def near_uniform(spec):
    """A function from (scale, zero point) to candidates around them."""
    low, high = F.uniform_code_range(spec.bits, spec.symmetric)

    def near(scale, zero_point):
        for factor in NEAR_FACTORS:
            for shift in (-1, 0, 1) if not spec.symmetric else (0, ):
                yield scale * factor, (zero_point + shift).clamp(low, high)

    return near


def near_log(steps_per_octave):
    """A function from (scale, steps an octave) to candidates around them."""
    stretches = (0.9, 1.0, 1.1) if steps_per_octave is None else (1.0, )

    def near(scale, steps):
        return [(scale * factor, steps * stretch)
                for factor in NEAR_FACTORS for stretch in stretches]

    return near


def least(cost, start, coarse, near):
    """The grid of least cost, for each scale: of `start` and `coarse`, then of it and `near` it.

    Args:
        cost (callable): takes a grid's tensors (groups,), gives costs (groups,).
        start (tuple[Tensor]): a grid.
        coarse (Iterable[tuple[Tensor]]): others.
        near (callable): takes a grid's tensors, gives grids.
    """
    best = _best_of([start, *coarse], cost)
    return _best_of([best, *near(*best)], cost)


def _refine_input(inputs, weight, quantize, start, coarse, near):
    """`least` for the error of a layer's output."""
    output_error = _relative_output_error(inputs, weight)
    if output_error is None:
        return start

    def cost(*grid):
        return output_error(quantize(*grid))

    return least(cost, start, coarse, near)


def _relative_output_error(inputs, weight):
    """What quantized inputs cost a layer's output, as a function of them.

    Each output channel's error counts relative to the channel's own variance: a few huge
    channels (massive activations of ViTs) would decide alone otherwise, with a step that
    rounds all other tokens to nothing.

    Returns:
        Callable | None: (n, fan_in) -> (1,); None for one row, or rows that are all alike.
    """
    deviation = (inputs @ weight.t()).std(0, correction=0)
    if not deviation.any():
        return None
    weight = weight / deviation.clamp(min=1e-5 * deviation.max())[:, None]
    if weight.shape[0] > weight.shape[1]:  # as long, with fewer rows
        weight = torch.linalg.qr(weight).R
    return lambda quantized: ((quantized - inputs) @ weight.t()).square().sum().view(1)


def _ends_and_widths(samples, steps):
    """Candidates for a range's lower end (k,) and for a step [(1,), ...].

    Ends are low quantiles; ranges go from the middle 80% of the values to all of them.
    """
    values = _at_most(samples.reshape(1, -1), _QUANTILE_LIMIT)
    ends = torch.quantile(values, values.new_tensor([0.0, 0.001, 0.01, 0.1, 0.9, 1.0]), dim=1)
    full = (ends[5] - ends[0]).clamp(min=1e-8)
    core = torch.maximum(ends[4] - ends[3], full / 512)
    shares = torch.linspace(0, 1, 25, device=full.device)
    return ends[:4, 0], (core * (full / core)**shares / steps).split(1)


def _best_range(samples, spec, ranges):
    """Of candidate ranges [(low, high), ...] the one of least squared error, per group.

    Returns:
        tuple[Tensor]: low, high, scale, zero point, each (groups,).
    """
    def error(low, high, scale, zero_point):
        values = on_uniform_grid(samples, scale[:, None], zero_point[:, None], spec)
        return (values - samples).square().mean(1)

    return _best_of(((low, high, *F.affine_from_range(low, high, spec.bits, spec.symmetric))
                     for low, high in ranges), error)
