"""Weights by least squares, in closed form, from second moments of a layer's inputs.

Weights are rows (rows, fan_in), see `QuantLayer.weight_rows`; moments are means over
samples, in double.
"""
import torch

from .search import on_uniform_grid

_BLOCK = 64  # columns whose errors reach what is behind them at once
_FACTORS = (1.0, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1)


def compensate(weight, gram, cross, strength):
    """The weight that makes most of quantized inputs: ridge regression (ERQ, ICML 2024).

    Least of |W x - W' x^|^2 + lambda |W' - W|^2 over samples, with x the float input, x^ the
    quantized one, and lambda = strength * mean diagonal of E[x^ x^T].

    Args:
        weight (Tensor): W (rows, fan_in).
        gram (Tensor): E[x^ x^T] (fan_in, fan_in).
        cross (Tensor): E[x x^T], float by quantized, (fan_in, fan_in).
        strength (float): above 0.

    Returns:
        Tensor: W', in double.
    """
    weight = weight.double()
    missed = weight @ (cross - gram)  # what is left of the output, against the inputs
    return weight + torch.linalg.solve(_damped(gram, strength), missed.t()).t()


def feed_back(weight, scale, zero_point, spec, gram, damping=0.01):
    """Round columns one by one, and let those to come make up for the error (GPTQ).

    Frantar et al., arXiv 2210.17323, columns of large inputs first. A row for which plain
    rounding to nearest has the smaller error keeps it.

    Args:
        weight (Tensor): W (rows, fan_in).
        scale, zero_point (Tensor): of the weight's quantizer, a row each (rows,).
        spec (QuantizerSpec): of that quantizer.
        gram (Tensor): E[x x^T] of the inputs as they arrive (fan_in, fan_in).
        damping (float): added to the diagonal, relative to its mean.

    Returns:
        Tensor: the weight, in double, moved such that rounding to nearest gives these codes.
    """
    weight = weight.double()
    scale, zero_point = scale.double(), zero_point.double()
    order = gram.diagonal().argsort(descending=True, stable=True)
    moved = weight[:, order]
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(_damped(gram, damping)[order][:, order])),
        upper=True)
    for start in range(0, moved.shape[1], _BLOCK):
        part, inner = moved[:, start:start + _BLOCK], factor[start:start + _BLOCK]
        errors = torch.empty_like(part)
        for i in range(part.shape[1]):
            column = part[:, i].clone()
            rounded = on_uniform_grid(column, scale, zero_point, spec)
            errors[:, i] = (column - rounded) / inner[i, start + i]
            part[:, i + 1:] -= torch.outer(
                errors[:, i], inner[i, start + i + 1:start + part.shape[1]])
        moved[:, start + _BLOCK:] -= errors @ inner[:, start + _BLOCK:]
    found = torch.empty_like(moved)
    found[:, order] = moved
    old, new = (_cost(w, weight, scale, zero_point, spec, gram) for w in (weight, found))
    return torch.where((new < old)[:, None], found, weight)


def feed_back_scaled(weight, scale, zero_point, spec, gram):
    """`feed_back`, and for each scale the multiple of it with which least is lost.

    A scale that was found for rounding to nearest is too large where errors make up for each
    other: what is clipped can be made up for, too.

    Args:
        weight, zero_point, spec, gram: as there.
        scale (Tensor): of the quantizer (scales,); each is that of as many rows in turn.
        zero_point (Tensor): likewise.

    Returns:
        tuple[Tensor, Tensor]: the moved weight, in double; the scales.
    """
    weight, shared, count = weight.double(), len(weight) // len(scale), len(_FACTORS)
    scales = torch.tensor(_FACTORS, dtype=scale.dtype, device=scale.device)[:, None] * scale
    # rows know nothing of each other, so all multiples are tried at once
    rows = [v.double().repeat_interleave(shared) for v in (
        scales.flatten(), zero_point.repeat(count))]
    moved = feed_back(weight.repeat(count, 1), *rows, spec, gram)
    cost = _cost(moved, weight.repeat(count, 1), *rows, spec, gram)
    best = cost.view(count, len(scale), shared).sum(-1).argmin(0)  # (scales,)
    each = torch.arange(len(scale), device=best.device)
    moved = moved.view(count, len(scale), shared, -1)[best, each]
    return moved.flatten(0, 1), scales[best, each]


def _cost(candidate, weight, scale, zero_point, spec, gram):
    """Mean squared error of each row's output, the candidate rounded to nearest."""
    error = on_uniform_grid(candidate, scale[:, None], zero_point[:, None], spec) - weight
    return ((error @ gram) * error).sum(1)


def _damped(gram, share):
    # where all inputs are zero any number above it will do
    return gram + (share * gram.diagonal().mean()).clamp(min=1e-12) * torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device)
