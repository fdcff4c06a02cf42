"""Stateless quantizer maths. Scales and zero points broadcast against the input.

Gradient rules: the round is straight-through, a clipped value passes no gradient,
and the scale gets the exact LSQ gradient (Esser et al., arXiv 1902.08153).
"""
import torch


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
    """x -> decode(encode(x)), with straight-through and LSQ gradients."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, low, high):
        ratio = x / scale
        steps = ratio.round().add_(zero_point).clamp_(low, high).sub_(zero_point)
        ctx.save_for_backward(ratio, steps, scale)
        return steps * scale

    @staticmethod
    def backward(ctx, grad):
        ratio, steps, scale = ctx.saved_tensors
        inside = ratio.round().eq_(steps)  # 1 where not clipped
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            # d x_hat / d scale = steps - (x / scale inside, 0 where clipped)
            slope = torch.addcmul(steps, ratio, inside, value=-1.0)
            grad_scale = slope.mul_(grad).sum_to_size(scale.shape)
        return grad_x, grad_scale, None, None, None


def fractional_fake_quantize(x, scale, zero_point, low, high):
    """`UniformFakeQuantize` for zero points that are no integers; the same gradients."""
    ratio = x / scale
    rounded = ratio.detach().round()
    steps = rounded.clamp(low - zero_point, high - zero_point)
    return torch.where(steps == rounded, ratio + (steps - ratio).detach(), steps) * scale


def log_encode(x, scale, bits, steps_per_octave, zero_below):
    """Codes of non-negative `x` on the grid scale * 2**(-code / steps_per_octave).

    With `zero_below` the last code means zero and takes every value at least one
    step below the smallest power; else the last code is a power
    and takes everything below. Either way there are exactly 2**bits codes.
    """
    last = 2**bits - 1
    exponent = torch.log2((x / scale).clamp(0.0, 1.0)) * -steps_per_octave  # of 0: infinity
    if not zero_below:
        return exponent.round().clamp(0, last)
    return torch.where(exponent >= last, last, exponent.round().clamp(0, last - 1))


def log_decode(codes, scale, bits, steps_per_octave, zero_below):
    """Values of `codes`."""
    values = torch.exp2(codes / -steps_per_octave) * scale
    if zero_below:
        values = torch.where(codes == 2**bits - 1, 0.0, values)
    return values


class LogFakeQuantize(torch.autograd.Function):
    """x -> decode(encode(x)) on a logarithmic grid, for x >= 0.

    Inside the grid d x_hat / dx = x_hat / x, and the two ways the scale enters
    cancel; where x is above the scale or saturates, only the scale gets a gradient.
    """

    @staticmethod
    def forward(ctx, x, scale, bits, steps_per_octave, zero_below):
        codes = log_encode(x, scale, bits, steps_per_octave, zero_below)
        values = log_decode(codes, scale, bits, steps_per_octave, zero_below)
        ctx.save_for_backward(x, scale, values)
        ctx.smallest = 2.0**(-(2**bits - 1 - zero_below) / steps_per_octave)
        return values

    @staticmethod
    def backward(ctx, grad):
        x, scale, values = ctx.saved_tensors
        ratio = x / scale
        clipped = (ratio > 1) | (ratio < ctx.smallest)
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            slope = values / x.clamp(min=torch.finfo(x.dtype).tiny)
            grad_x = grad * slope.masked_fill_(clipped, 0)
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * (values / scale) * clipped).sum_to_size(scale.shape)
        return grad_x, grad_scale, None, None, None
