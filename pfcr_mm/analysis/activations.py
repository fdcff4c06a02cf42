"""Activations: ranges, distributions and clipping, by role and layer."""
import math

import torch

from ..models.mlp import post_gelu_layers
from ..models.reparam import post_norm_pairs
from ..quantizers import LogQuantizer
from .noise import plain_db, sqnr_db
from .taps import grid

ROLES = {'post-LN': 'after LayerNorm', 'post-GELU': 'after GELU', 'q': 'q', 'k': 'k',
         'v': 'v', 'softmax': 'after softmax', 'other': 'input of other layers'}
SHARES = (0.001, 0.25, 0.75, 0.999)  # low, q1, q3, high of a distribution


def roles(model):
    """What each activation quantizer quantizes: a key of `ROLES` by quantizer name."""
    names = {id(module): name for name, module in model.named_modules()}
    after_gelu = {names[id(layer)] for layer in post_gelu_layers(model)}
    after_norm = {names[id(layer)] for _, layer, _ in post_norm_pairs(model)}
    operands = {'matmul_qk.left': 'q', 'matmul_qk.right': 'k', 'matmul_av.left': 'softmax',
                'matmul_av.right': 'v'}
    found = {}
    for name in names.values():
        if not name.endswith('_quantizer') or name.endswith('weight_quantizer'):
            continue
        owner = name.removesuffix('.input_quantizer')
        operand = next((role for end, role in operands.items()
                        if name.endswith(f'{end}_quantizer')), None)
        if operand:
            found[name] = operand
        elif owner in after_norm:
            found[name] = 'post-LN'
        else:
            found[name] = 'post-GELU' if owner in after_gelu else 'other'
    return found


@torch.no_grad()
def activations(model, floating_taps, taps):
    """Range, clipping and noise of every activation quantizer that data has reached.

    Args:
        model (nn.Module): quantized.
        floating_taps, taps (Taps): of the float twin and of the quantized model, filled.

    Returns:
        list[dict]: name, role, kind, bits, scales (how many), scale_min, scale_max,
        shift (of a logarithmic grid, None of a uniform one), grid_low, grid_high (the
        widest of all groups), float_low, float_q1, float_q3, float_high, low, q1, q3, high
        (0.1%, 25%, 75% and 99.9% of the values), clipped (share of values beyond the grid),
        zeroed (share that becomes zero), sqnr_db (of quantizing what arrives), worst_group.
    """
    found = []
    by_name = dict(model.named_modules())
    for name, role in roles(model).items():
        quantizer, values = by_name[name], taps.seen[name].values()
        reference = floating_taps.seen[name].values()
        if values is None or reference is None or not quantizer.enabled:
            continue
        entry = dict(name=name, role=role, kind=quantizer.spec.kind, bits=quantizer.bits,
                     scales=quantizer.scale.numel(), scale_min=quantizer.scale.min().item(),
                     scale_max=quantizer.scale.max().item(), shift=_shift(quantizer))
        for key, sample in (('float_', reference), ('', values)):
            for end, value in zip(('low', 'q1', 'q3', 'high'), quantiles(sample)):
                entry[f'{key}{end}'] = value
        entry.update(_against_grid(quantizer, values))
        found.append(entry)
    return found


def quantiles(values):
    """0.1%, 25%, 75% and 99.9% quantiles of a sample, as floats."""
    finite = values[torch.isfinite(values)]
    if finite.numel() == 0:
        return [math.nan] * len(SHARES)
    return torch.quantile(finite.flatten(), torch.tensor(SHARES)).tolist()


def _against_grid(quantizer, values):
    """What quantization does to values (n, groups)."""
    levels = grid(quantizer)
    if levels is None:
        return dict(grid_low=None, grid_high=None, clipped=None, zeroed=None, sqnr_db=None,
                    worst_group=0)
    # as the quantizer rounds: a logarithmic one does so between logarithms
    axis = -1 if quantizer.axis is None else quantizer.axis
    x = values.to(quantizer.scale.device).movedim(-1, axis)
    quantized = quantizer.fake_quantize(x).movedim(axis, -1).cpu()
    signal = values.double().square().sum(0)
    noise = (quantized - values).double().square().sum(0)
    by_group = [sqnr_db(s, n) for s, n in zip(signal.tolist(), noise.tolist())]
    return dict(
        grid_low=levels.min().item(), grid_high=levels.max().item(),
        clipped=clipped_share(values, levels, _shift(quantizer)),
        zeroed=(quantized == 0).double().mean().item(),
        sqnr_db=plain_db(sqnr_db(signal.sum().item(), noise.sum().item())),
        worst_group=min(range(len(by_group)), key=by_group.__getitem__))


def clipped_share(values, levels, shift=None):
    """Share of values more than a step beyond the ends of the grid.

    Half a step beyond is no more than rounding costs anywhere: GELU's least value, -0.17, often
    lies there, below a uniform grid that starts at zero. A step of a logarithmic grid is the
    ratio of two levels, without its shift; small values have zero or its smallest power, so
    that only what lies below -shift clips at its lower end.

    Args:
        values (Tensor): (n, groups).
        levels (Tensor): (groups, levels), ascending.
        shift (float | None): of a logarithmic grid; None of a uniform one.
    """
    if shift is None:
        above = values > 2 * levels[:, -1] - levels[:, -2]
        below = values < 2 * levels[:, 0] - levels[:, 1]
    else:
        powers, values = levels + shift, values + shift
        above = values > powers[:, -1] * (powers[:, -1] / powers[:, -2])
        below = values < -powers[:, 1]
    return (above | below).double().mean().item()


def _shift(quantizer):
    return quantizer.spec.shift if isinstance(quantizer, LogQuantizer) else None
