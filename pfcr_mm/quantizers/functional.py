"""Stateless quantizer maths. Scales and zero points broadcast against the input.

Gradient rules: the round is straight-through, a clipped value passes no gradient,
and the scale gets the exact LSQ gradient (Esser et al., arXiv 1902.08153).
"""
import torch

from .blocks import between, blocks, dense_like, dot


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
    its own: d x_hat / d scale = (x_hat - x) / scale inside, x_hat / scale where clipped.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, low, high):
        if _is_plain(scale, x):
            shift = zero_point.item()
            values = (x / scale).round_().clamp_(low - shift, high - shift).mul_(scale)
        else:
            values = dense_like(x)
            for x_, out, s, z in blocks((x, values), (scale, zero_point)):
                out.copy_(x_).div_(s).round_().add_(z).clamp_(low, high).sub_(z).mul_(s)
        ctx.save_for_backward(x, scale, zero_point, values)
        ctx.ends = low - 0.5, high + 0.5  # of the codes before rounding
        return values

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point, values = ctx.saved_tensors
        grad_x, grad_scale = torch.empty_like(values), torch.zeros_like(scale)
        low, high = ctx.ends
        if _is_plain(scale, x, grad):
            step, shift = scale.item(), zero_point.item()
            between(grad, x, (low - shift) * step, (high - shift) * step, out=grad_x)
            if ctx.needs_input_grad[1]:
                grad_scale += dot(grad, values) - dot(grad_x, x)
            return grad_x, grad_scale.div_(scale), None, None, None
        for g, x_, v, gx, s, z, gs in blocks(
                (grad, x, values, grad_x), (scale, zero_point, grad_scale)):
            if x_.stride() != v.stride():
                x_ = torch.empty_like(v).copy_(x_)
            between(g, (x_ / s).add_(z), low, high, out=gx)
            if ctx.needs_input_grad[1]:
                gs.add_((g * v).addcmul_(gx, x_, value=-1.0).sum_to_size(gs.shape))
        return grad_x, grad_scale.div_(scale), None, None, None


def _is_plain(scale, *tensors):
    """One scale, which can be read without waiting for a GPU, and tensors without gaps."""
    return scale.numel() == 1 and scale.device.type == 'cpu' and all(
        t.is_contiguous() for t in tensors)


def fractional_fake_quantize(x, scale, zero_point, low, high):
    """`UniformFakeQuantize` for zero points that are no integers; the same gradients."""
    ratio = x / scale
    rounded = ratio.detach().round()
    steps = rounded.clamp(low - zero_point, high - zero_point)
    return torch.where(steps == rounded, ratio + (steps - ratio).detach(), steps) * scale


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
    def forward(ctx, x, scale, bits, steps_per_octave, zero_below, shift=0.0):
        by_exponent = (not torch.is_tensor(steps_per_octave) and steps_per_octave in (1, 2)
                       and bits <= 6 and x.dtype in _EXPONENTS)
        steps = torch.as_tensor(steps_per_octave).to(scale).expand_as(scale)
        values = dense_like(x)
        for x_, out, s, r in blocks((x, values), (scale, steps)):
            if by_exponent:
                _log_by_exponent(x_ + shift, s, bits, steps_per_octave, zero_below, out)
            else:
                _log_by_logarithm(x_ + shift, s, bits, r, zero_below, out)
            out.sub_(shift)
        ctx.save_for_backward(x, scale, steps, values)
        ctx.last, ctx.shift = 2**bits - 1 - zero_below, shift
        return values

    @staticmethod
    def backward(ctx, grad):
        x, scale, steps, values = ctx.saved_tensors
        grad_x, grad_scale = torch.empty_like(values), torch.zeros_like(scale)
        for g, x_, v, gx, s, r, gs in blocks(
                (grad, x, values, grad_x), (scale, steps, grad_scale)):
            ratio = (x_ + ctx.shift).clamp_(min=_TINY).div_(s)
            product = (v + ctx.shift).mul_(g)
            # a little beyond both ends, which themselves are inside
            smallest = torch.exp2(-ctx.last / r) * (1 - 1e-6)
            between(product, ratio, smallest, 1 + 1e-6, out=gx)
            if ctx.needs_input_grad[1]:
                gs.add_(product.sub_(gx).sum_to_size(gs.shape))
            gx.div_(ratio.mul_(s))
        return grad_x, grad_scale.div_(scale), None, None, None, None


_TINY = 1e-30  # what is less is zero: masked softmax gives 1e-44, and such numbers take long
# By type: the same bits as integers, and those of them that are the exponent.
_EXPONENTS = {torch.float32: (torch.int32, 0xFF << 23), torch.float64: (torch.int64, 0x7FF << 52)}


def _log_by_exponent(x, scale, bits, steps_per_octave, zero_below, out):
    """What `log_decode` gives for `log_encode`, without logarithms, for 1 or 2 steps an octave.

    A number with its mantissa cleared is the power of two below it; so round to nearest
    is that of sqrt(2) * x. For two steps an octave the same is done to the square. Bits are
    6 at most, so that no square is too small. Overwrites `x`.
    """
    integer, mask = _EXPONENTS[x.dtype]
    last, shift = 2**bits - 1, 2.0**0.5
    ratio = x.clamp_(min=_TINY).div_(scale)
    if steps_per_octave == 2:
        ratio.clamp_(min=2.0**-40).square_()
    ratio.mul_(shift)
    torch.clamp(ratio, 2.0**(zero_below - last), 1.0, out=out)
    out.view(integer).bitwise_and_(mask)
    if zero_below:  # 0 where `ratio` is one step below the smallest power, or more
        _zero_up_to(shift * 2.0**-last, ratio, out)
    if steps_per_octave == 2:
        out.sqrt_()
    out.mul_(scale)


def _log_by_logarithm(x, scale, bits, steps_per_octave, zero_below, out):
    """What `log_decode` gives for `log_encode`, to the bit. Overwrites `x`."""
    last = 2**bits - 1
    power = x.div_(scale).clamp_(0.0, 1.0).log2_().mul_(steps_per_octave)  # -code; of 0: -infinity
    torch.round(power, out=out).clamp_(zero_below - last, 0)
    out.div_(steps_per_octave).exp2_().mul_(scale)
    if zero_below:
        _zero_up_to(-last, power, out)


def _zero_up_to(bound, x, out):
    """Set `out` to zero where x <= bound; choosing by a boolean takes several times as long."""
    torch.ops.aten.threshold_backward.grad_input(out, x, bound, grad_input=out)
