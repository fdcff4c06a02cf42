"""Values and gradients of quantizers, by PyTorch's own operations, in place and in blocks.

Scales, zero points and steps broadcast against the input and are all of one shape. Where `keep`
(uint8, shaped like the input) is 0, numbers stay as they are, and so do their gradients (QDrop).
"""
import torch

from .blocks import between, blocks, dense_like, dot, joined, mixed, parted

TINY = 1e-30  # what is less is zero: masked softmax gives 1e-44, and such numbers take long
# By type: the same bits as integers, and those of them that are the exponent.
_EXPONENTS = {torch.float32: (torch.int32, 0xFF << 23), torch.float64: (torch.int64, 0x7FF << 52)}


def uniform_values(x, scale, zero_point, low, high, keep=None):
    """The nearest of the values (k - zero_point) * scale, low <= k <= high."""
    if _is_plain(scale, x):
        shift = zero_point.item()
        values = (x / scale).round_().clamp_(low - shift, high - shift).mul_(scale)
        return mixed(x, values, keep)
    values = dense_like(x)
    for x_, out, s, z in blocks((x, values), (scale, zero_point)):
        out.copy_(x_).div_(s).round_().add_(z).clamp_(low, high).sub_(z).mul_(s)
    return mixed(x, values, keep)


def uniform_gradients(grad, x, values, scale, zero_point, low, high, keep=None, of_x=True,
                      of_scale=True):
    """Gradients of `x` (None without `of_x`) and of the scale (zero without `of_scale`).

    Args:
        grad (Tensor): of `values`, which `uniform_values` has given for `x`.
    """
    grad, passed = parted(grad, keep)
    grad_x, grad_scale = torch.empty_like(values), torch.zeros_like(scale)
    low, high = low - 0.5, high + 0.5  # of the codes before rounding
    if _is_plain(scale, x, grad):
        step, shift = scale.item(), zero_point.item()
        between(grad, x, (low - shift) * step, (high - shift) * step, out=grad_x)
        if of_scale:
            grad_scale += dot(grad, values) - dot(grad_x, x)
        return joined(grad_x, passed) if of_x else None, grad_scale.div_(scale)
    for g, x_, v, gx, s, z, gs in blocks(
            (grad, x, values, grad_x), (scale, zero_point, grad_scale)):
        if x_.stride() != v.stride():
            x_ = torch.empty_like(v).copy_(x_)
        between(g, (x_ / s).add_(z), low, high, out=gx)
        if of_scale:
            gs.add_((g * v).addcmul_(gx, x_, value=-1.0).sum_to_size(gs.shape))
    return joined(grad_x, passed) if of_x else None, grad_scale.div_(scale)


def log_values(x, scale, steps, bits, zero_below, shift, known=None, keep=None):
    """`log_decode` of `log_encode` of x + shift, less the shift.

    `known` is the number of steps an octave where all scales have the same.
    """
    by_exponent = known in (1, 2) and bits <= 6 and x.dtype in _EXPONENTS
    values = dense_like(x)
    for x_, out, s, r in blocks((x, values), (scale, steps)):
        if by_exponent:
            _log_by_exponent(x_ + shift, s, bits, known, zero_below, out)
        else:
            _log_by_logarithm(x_ + shift, s, bits, r, zero_below, out)
        out.sub_(shift)
    return mixed(x, values, keep)


def log_gradients(grad, x, values, scale, steps, last, shift, keep=None, of_x=True,
                  of_scale=True):
    """Gradients of `x` (None without `of_x`) and of the scale (zero without `of_scale`).

    Args:
        grad (Tensor): of `values`, which `log_values` has given for `x`.
        last (int): code of the smallest power.
    """
    grad, passed = parted(grad, keep)
    grad_x, grad_scale = torch.empty_like(values), torch.zeros_like(scale)
    for g, x_, v, gx, s, r, gs in blocks(
            (grad, x, values, grad_x), (scale, steps, grad_scale)):
        ratio = (x_ + shift).clamp_(min=TINY).div_(s)
        product = (v + shift).mul_(g)
        # a little beyond both ends, which themselves are inside
        between(product, ratio, torch.exp2(-last / r) * (1 - 1e-6), 1 + 1e-6, out=gx)
        if of_scale:
            gs.add_(product.sub_(gx).sum_to_size(gs.shape))
        gx.div_(ratio.mul_(s))
    return joined(grad_x, passed) if of_x else None, grad_scale.div_(scale)


def _is_plain(scale, *tensors):
    """One scale, which can be read without waiting for a GPU, and tensors without gaps."""
    return scale.numel() == 1 and scale.device.type == 'cpu' and all(
        t.is_contiguous() for t in tensors)


def _log_by_exponent(x, scale, bits, steps_per_octave, zero_below, out):
    """What `log_decode` gives for `log_encode`, without logarithms, for 1 or 2 steps an octave.

    A number with its mantissa cleared is the power of two below it; so round to nearest
    is that of sqrt(2) * x. For two steps an octave the same is done to the square. Bits are
    6 at most, so that no square is too small. Overwrites `x`.
    """
    integer, mask = _EXPONENTS[x.dtype]
    last, shift = 2**bits - 1, 2.0**0.5
    ratio = x.clamp_(min=TINY).div_(scale)
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
