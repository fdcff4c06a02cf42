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


def search_log_scale(samples, spec, steps_per_octave, minmax=None):
    """Scale of a logarithmic quantizer by mean squared error, shape (groups,)."""
    top = (minmax[1] if minmax is not None else samples.amax(1)).clamp(min=1e-8)
    best_error = torch.full_like(top, torch.inf)
    best = top
    for step in range(33):  # down to a sixteenth of the largest value
        scale = top * 2.0**(-step / 8)
        column = scale[:, None]
        codes = F.log_encode(samples, column, spec.bits, steps_per_octave, spec.zero_below)
        values = F.log_decode(codes, column, spec.bits, steps_per_octave, spec.zero_below)
        error = (values - samples).square().mean(1)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def search_log_grid(samples, spec, minmax=None):
    """Scale and steps an octave of a logarithmic quantizer, by mean squared error.

    Args:
        samples (Tensor): (groups, n), not negative.
        minmax (tuple[Tensor] | None): true extremes (groups,).

    Returns:
        tuple[Tensor, Tensor]: scale and steps an octave, each (groups,).
    """
    top = (minmax[1] if minmax is not None else samples.amax(1)).clamp(min=1e-8)
    best_error = torch.full_like(top, torch.inf)
    best = (top, torch.ones_like(top))
    for scale, steps in _log_grids(top, spec):
        values = _on_log_grid(samples, scale[:, None], steps, spec)
        error = (values - samples).square().mean(1)
        better = error < best_error
        best = torch.where(better, scale, best[0]), torch.where(better, steps, best[1])
        best_error = torch.minimum(error, best_error)
    return best


def _log_grids(top, spec):
    """Candidates (scale like `top`, steps an octave): down to a 64th, over 1 to 16 octaves."""
    intervals = 2**spec.bits - 1 - spec.zero_below
    for step in range(13):
        for octaves in torch.linspace(0, 4, 17).exp2().tolist():
            yield top * 2.0**(-step / 2), intervals / octaves


def _on_log_grid(samples, scale, steps, spec):
    codes = F.log_encode(samples, scale, spec.bits, steps, spec.zero_below)
    return F.log_decode(codes, scale, spec.bits, steps, spec.zero_below)


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
    low, high = F.uniform_code_range(spec.bits, spec.symmetric)
    grouped = weight.reshape(groups, -1)
    gram = inputs.t() @ inputs if inputs.shape[0] > inputs.shape[1] else None
    best = torch.full_like(scale, torch.inf)
    best_scale, best_zero = scale, zero_point
    for factor in WEIGHT_FACTORS:
        new_scale = scale * factor
        # keep the real value of the middle code where it was
        middle = (low + high) / 2
        new_zero = zero_point if spec.symmetric else (
            middle - (middle - zero_point) / factor).round().clamp(low, high)
        codes = F.uniform_encode(grouped, new_scale[:, None], new_zero[:, None], low, high)
        error = F.uniform_decode(codes, new_scale[:, None], new_zero[:, None]) - grouped
        error = error.reshape(weight.shape)
        if gram is None:
            cost = (error @ inputs.t()).square().sum(1)
        else:
            cost = ((error @ gram) * error).sum(1)
        cost = cost.reshape(groups, -1).sum(1)
        better = cost < best
        best = torch.where(better, cost, best)
        best_scale = torch.where(better, new_scale, best_scale)
        best_zero = torch.where(better, new_zero, best_zero)
    return best_scale, best_zero


def refine_activation(inputs, weight, scale, zero_point, spec):
    """Search a per-tensor input quantizer for the least error of the layer's *output*.

    Args:
        inputs (Tensor): sampled inputs (n, fan_in), float.
        weight (Tensor): the weight in force (rows, fan_in).
        scale, zero_point (Tensor): shape (1,), what is in force.

    Returns:
        tuple[Tensor, Tensor]: scale and zero point, (1,).
    """
    code_low, code_high = F.uniform_code_range(spec.bits, spec.symmetric)
    output_error = _relative_output_error(inputs, weight)
    if output_error is None:
        return scale, zero_point
    best, best_cost = (scale, zero_point), torch.inf

    def offer(scale, zero_point):
        nonlocal best, best_cost
        codes = F.uniform_encode(inputs, scale, zero_point, code_low, code_high)
        cost = output_error(F.uniform_decode(codes, scale, zero_point))
        if cost < best_cost:
            best, best_cost = (scale, zero_point), cost

    def zero_points(scale):
        if spec.symmetric:
            return [zero_point]
        return (code_low - lows / scale).round().clamp(code_low, code_high).unique().split(1)

    offer(scale, zero_point)
    lows, widths = _ends_and_widths(inputs, code_high - code_low)
    for width in widths:
        for zero in zero_points(width):
            offer(width, zero)
    scale, zero_point = best
    for factor in NEAR_FACTORS:
        for shift in (-1, 0, 1) if not spec.symmetric else (0, ):
            offer(scale * factor, (zero_point + shift).clamp(code_low, code_high))
    return best


def refine_log_grid(inputs, weight, scale, steps, spec):
    """Search a per-tensor logarithmic input quantizer as `refine_activation` does.

    Args:
        inputs (Tensor): sampled inputs (n, fan_in), float, not negative.
        weight (Tensor): the weight in force (rows, fan_in).
        scale, steps (Tensor): scale and steps an octave in force, (1,).

    Returns:
        tuple[Tensor, Tensor]: scale and steps an octave, (1,).
    """
    output_error = _relative_output_error(inputs, weight)
    if output_error is None:
        return scale, steps
    best, best_cost = (scale, steps), torch.inf

    def offer(scale, steps):
        nonlocal best, best_cost
        cost = output_error(_on_log_grid(inputs, scale, steps, spec))
        if cost < best_cost:
            best, best_cost = (scale, steps), cost

    offer(scale, steps)
    for candidate, number in _log_grids(inputs.amax().view(1), spec):
        offer(candidate, torch.full_like(steps, number))
    scale, steps = best
    for factor in NEAR_FACTORS:
        for stretch in (0.9, 1.0, 1.1):
            offer(scale * factor, steps * stretch)
    return best


def _relative_output_error(inputs, weight):
    """What quantized inputs cost a layer's output, as a function of them.

    Each output channel's error counts relative to the channel's own variance: a few huge
    channels (massive activations of ViTs) would decide alone otherwise, with a step that
    rounds all other tokens to nothing.

    Returns:
        Callable | None: (n, fan_in) -> float; None for one row, or rows that are all alike.
    """
    deviation = (inputs @ weight.t()).std(0, correction=0)
    if not deviation.any():
        return None
    weight = weight / deviation.clamp(min=1e-5 * deviation.max())[:, None]
    if weight.shape[0] > weight.shape[1]:  # as long, with fewer rows
        weight = torch.linalg.qr(weight).R
    return lambda quantized: ((quantized - inputs) @ weight.t()).square().sum().item()


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
    code_low, code_high = F.uniform_code_range(spec.bits, spec.symmetric)
    best = torch.full_like(samples[:, 0], torch.inf)
    chosen = None
    for low, high in ranges:
        scale, zero_point = F.affine_from_range(low, high, spec.bits, spec.symmetric)
        codes = F.uniform_encode(
            samples, scale[:, None], zero_point[:, None], code_low, code_high)
        values = F.uniform_decode(codes, scale[:, None], zero_point[:, None])
        error = (values - samples).square().mean(1)
        candidate = (low, high, scale, zero_point)
        if chosen is None:
            best, chosen = error, candidate
            continue
        better = error < best
        best = torch.where(better, error, best)
        chosen = tuple(torch.where(better, new, old) for new, old in zip(candidate, chosen))
    return chosen
