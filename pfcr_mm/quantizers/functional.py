"""Stateless quantizer maths. Scales and zero points broadcast against the input.

Gradient rules: the round is straight-through, a clipped value passes no gradient,
and the scale gets the exact LSQ gradient (Esser et al., arXiv 1902.08153).
"""
import torch
from torch.autograd.function import once_differentiable

from . import native
from .blocks import mixed

kernels = native  # what values and gradients are computed with; `fused_kernels` changes it


def uniform_code_range(bits, symmetric):
    """Lowest and highest code of a uniform quantizer: exactly 2**bits codes."""
    return (-2**(bits - 1), 2**(bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def uniform_encode(x, scale, zero_point, low, high):
    """Codes of `x` as a float tensor of integers in [low, high]."""
    return (x / scale).round_().add_(zero_point).clamp_(low, high)


def uniform_decode(codes, scale, zero_point):
    """Values of `codes`."""
    return (codes - zero_point) * scale


def affine_from_range(low, high, bits, symmetric=False, eps=1e-8):
    """Scale and integer zero point that cover [low, high], zero always included.

    Args:
        low, high (Tensor): bounds, any common shape.

    Returns:
        tuple[Tensor, Tensor]: scale (at least `eps`, so that a constant channel
        is harmless) and zero point.
    """
    code_low, code_high = uniform_code_range(bits, symmetric)
    if symmetric:
        scale = torch.maximum(-low, high) / (-code_low - 0.5)
        return scale.clamp(min=eps), torch.zeros_like(scale)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (code_high - code_low)).clamp(min=eps)
    return scale, (-low / scale).round().clamp(code_low, code_high)


class UniformFakeQuantize(torch.autograd.Function):
    """x -> decode(encode(x)), with straight-through and LSQ gradients.

    Keeps input and output, which their neighbours in the graph hold anyway, and no map of
    its own: d x_hat / d scale = (x_hat - x) / scale inside, x_hat / scale where clipped. Where
    `keep` (uint8, shaped like x) is 0, x stays as it is (QDrop).
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, low, high, keep=None):
        values = kernels.uniform_values(x, scale, zero_point, low, high, keep)
        ctx.save_for_backward(x, scale, zero_point, values, keep)
        ctx.codes = low, high
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale, zero_point, values, keep = ctx.saved_tensors
        return *kernels.uniform_gradients(
            grad, x, values, scale, zero_point, *ctx.codes, keep, *ctx.needs_input_grad[:2]
        ), None, None, None, None


def fractional_fake_quantize(x, scale, zero_point, low, high, keep=None):
    """`UniformFakeQuantize` for zero points that are no integers; the same gradients."""
    ratio = x / scale
    rounded = ratio.detach().round()
    steps = rounded.clamp(low - zero_point, high - zero_point)
    values = torch.where(steps == rounded, ratio + (steps - ratio).detach(), steps) * scale
    return mixed(x, values, keep)


def log_encode(x, scale, bits, steps_per_octave, zero_below):
    """Codes of non-negative `x` on the grid scale * 2**(-code / steps_per_octave).

    Steps are a number or a tensor that broadcasts. With `zero_below` the last code means zero
    and takes every value at least one step below the smallest power; else the last code is a
    power and takes everything below. Either way there are exactly 2**bits codes.
    """
    last = 2**bits - 1
    exponent = (x / scale).clamp_(0.0, 1.0).log2_().mul_(-steps_per_octave)  # of 0: infinity
    if not zero_below:
        return exponent.round_().clamp_(0, last)
    return torch.where(exponent >= last, last, exponent.round().clamp(0, last - 1))


def log_decode(codes, scale, bits, steps_per_octave, zero_below):
    """Values of `codes`."""
    values = (codes / -steps_per_octave).exp2_().mul_(scale)
    if zero_below:
        values = torch.where(codes == 2**bits - 1, 0.0, values)
    return values


class LogFakeQuantize(torch.autograd.Function):
    """x -> decode(encode(x + shift)) - shift on a logarithmic grid, for x >= -shift.

    Inside the grid d x_hat / dx = x_hat / x (both shifted), and the two ways the scale enters
    cancel; where x is above the scale or saturates, only the scale gets a gradient. Steps an
    octave are a number, or a tensor shaped like the scale, and fixed.
    """

    @staticmethod
    def forward(ctx, x, scale, bits, steps_per_octave, zero_below, shift=0.0, keep=None):
        if torch.is_tensor(steps_per_octave):
            known, steps = None, steps_per_octave.to(scale).expand_as(scale)
        else:
            known, steps = steps_per_octave, torch.full_like(scale, steps_per_octave)
        values = kernels.log_values(x, scale, steps, bits, zero_below, shift, known, keep)
        ctx.save_for_backward(x, scale, steps, values, keep)
        ctx.last, ctx.shift = 2**bits - 1 - zero_below, shift
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale, steps, values, keep = ctx.saved_tensors
        return *kernels.log_gradients(
            grad, x, values, scale, steps, ctx.last, ctx.shift, keep, *ctx.needs_input_grad[:2]
        ), None, None, None, None, None
