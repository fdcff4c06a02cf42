"""Values and gradients of quantizers in one pass each, by Triton, for float tensors on a GPU.

The same functions as in `eager.py`, which takes what these do not. Uniform values are equal; a
logarithm near the border of two codes may be rounded the other way. Sums run in one order, so
gradients are the same from call to call.
"""
import torch
import triton
import triton.language as tl

from . import eager
from .blocks import dense_like, fit_together

BLOCK = 2048  # numbers of a program at most
LEAST = 64
NAN = tl.constexpr(tl.PropagateNan.ALL)
TINY = tl.constexpr(eager.TINY)
TURN = tl.constexpr(1.5 * 2.0**23)  # beyond it a float has no fraction: adding it rounds to even


def uniform_values(x, scale, zero_point, low, high, keep=None):
    if not _takes(x, keep, scale, zero_point):
        return eager.uniform_values(x, scale, zero_point, low, high, keep)
    return _Flat(x, scale, keep).values(
        _uniform_values, x, [scale, zero_point], [float(low), float(high)])


def uniform_gradients(grad, x, values, scale, zero_point, low, high, keep=None, of_x=True,
                      of_scale=True):
    if not _takes(x, keep, scale, zero_point):
        return eager.uniform_gradients(
            grad, x, values, scale, zero_point, low, high, keep, of_x, of_scale)
    return _Flat(values, scale, keep).gradients(
        _uniform_gradients, [grad, x], [scale, zero_point], [float(low), float(high)], of_x,
        of_scale)


def log_values(x, scale, steps, bits, zero_below, shift, known=None, keep=None):
    if not _takes(x, keep, scale, steps):
        return eager.log_values(x, scale, steps, bits, zero_below, shift, known, keep)
    return _Flat(x, scale, keep).values(
        _log_values, x, [scale, steps], [2.0**bits - 1, float(shift)], zero_below=bool(zero_below))


def log_gradients(grad, x, values, scale, steps, last, shift, keep=None, of_x=True, of_scale=True):
    if not _takes(x, keep, scale, steps):
        return eager.log_gradients(
            grad, x, values, scale, steps, last, shift, keep, of_x, of_scale)
    return _Flat(values, scale, keep).gradients(
        _log_gradients, [grad, x, values], [scale, steps], [float(last), float(shift)], of_x,
        of_scale)


def _takes(x, keep, scale, *others):
    """Whether this module does it: places are numbers of 32 bits."""
    return x.numel() < 2**31 and fit_together(x, keep, scale, *others)


class _Flat:
    """Tensors of one shape as they lie in memory, all alike and without gaps.

    The scale of the number at `at` is then the one at (at // inner) % many.

    Args:
        x (Tensor): gives the shape and the order of axes.
        scale (Tensor): broadcasts against it.
        keep (Tensor | None): see `eager.py`.
    """

    def __init__(self, x, scale, keep):
        self.out, self.scale, self.many = dense_like(x), scale, scale.numel()
        axis = next((i for i, n in enumerate(scale.shape, x.dim() - scale.dim()) if n > 1), None)
        self.inner = 1 if axis is None else self.out.stride(axis)
        self.keep = self(keep)

    def __call__(self, tensor):
        """The tensor, or a copy of it that lies as the others do."""
        if tensor is None or all(a == b for a, b, n in zip(
                tensor.stride(), self.out.stride(), tensor.shape) if n > 1):
            return tensor
        return torch.empty_like(self.out, dtype=tensor.dtype).copy_(tensor)

    def values(self, kernel, x, scales, numbers, **options):
        """One pass: x -> values."""
        count = x.numel()
        block = _block(count)
        with torch.cuda.device_of(x):
            kernel[(triton.cdiv(count, block), )](
                self(x), self.keep, self.out, *(t.contiguous() for t in scales), *numbers, count,
                self.inner, self.many, drops=self.keep is not None, several=self.many > 1,
                block=block, **options)
        return self.out

    def gradients(self, kernel, tensors, scales, numbers, of_x, of_scale):
        """One pass: the gradient of `x`, and sums of programs, which all have one scale."""
        each = self.out.numel() // self.many
        block = _block(each)
        chunks = triton.cdiv(each, block)
        grad_x = self.out if of_x else None
        sums = self.out.new_empty(self.many, chunks) if of_scale else None
        with torch.cuda.device_of(self.out):
            kernel[(self.many * chunks, )](
                *map(self, tensors), self.keep, grad_x, sums, *(t.contiguous() for t in scales),
                *numbers, each, self.inner, self.many, chunks, of_x=of_x, of_scale=of_scale,
                drops=self.keep is not None, several=self.many > 1, block=block)
        if not of_scale:
            return grad_x, torch.zeros_like(self.scale)
        return grad_x, sums.sum(1).view(self.scale.shape).div_(self.scale)


def _block(count):
    return max(LEAST, min(BLOCK, triton.next_power_of_2(count)))


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low, NAN), high, NAN)


@triton.jit
def _round(x):
    """To the nearest integer, to even from the middle, for |x| < 2**22."""
    return (x + TURN) - TURN


@triton.jit
def _uniform(x, scale, zero, low, high):
    return _round(_clamp(tl.div_rn(x, scale), low - zero, high - zero)) * scale


@triton.jit(do_not_specialize=['inner', 'many'])
def _uniform_values(x, keep, out, scale, zero, low, high, count, inner, many,
                    drops: tl.constexpr, several: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    here = at < count
    of = (at // inner) % many if several else 0
    found = tl.load(x + at, mask=here, other=0.0)
    values = _uniform(found, tl.load(scale + of), tl.load(zero + of), low, high)
    if drops:
        values = tl.where(tl.load(keep + at, mask=here, other=0) != 0, values, found)
    tl.store(out + at, values, mask=here)


@triton.jit(do_not_specialize=['inner', 'many'])
def _log_values(x, keep, out, scale, steps, last, shift, count, inner, many,
                zero_below: tl.constexpr, drops: tl.constexpr, several: tl.constexpr,
                block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    here = at < count
    of = (at // inner) % many if several else 0
    found = tl.load(x + at, mask=here, other=0.0)
    size, octave = tl.load(scale + of), tl.load(steps + of)
    ratio = _clamp(tl.div_rn(found + shift, size), 0.0, 1.0)
    power = tl.log2(ratio) * octave  # of zero: -infinity
    codes = _round(_clamp(power, zero_below - last, 0.0))
    values = tl.exp2(tl.div_rn(codes, octave)) * size
    if zero_below:
        values = tl.where(power <= -last, 0.0, values)
    values -= shift
    if drops:
        values = tl.where(tl.load(keep + at, mask=here, other=0) != 0, values, found)
    tl.store(out + at, values, mask=here)


@triton.jit
def _places(each, inner, many, chunks, several: tl.constexpr, block: tl.constexpr):
    """Which scale a program has, where its numbers lie, and which of them there are."""
    of = tl.program_id(0) // chunks
    number = (tl.program_id(0) % chunks) * block + tl.arange(0, block)
    at = ((number // inner) * many + of) * inner + number % inner if several else number
    return of, at, number < each


@triton.jit
def _finish(passed, counts, grad, at, here, keep, grad_x, sums, of_x: tl.constexpr,
            of_scale: tl.constexpr, drops: tl.constexpr):
    """Write gradients of `x`, and the sum of what the scale gets."""
    if drops:
        kept = tl.load(keep + at, mask=here, other=0) != 0
        passed = tl.where(kept, passed, grad)
        counts = tl.where(kept, counts, 0.0)
    if of_x:
        tl.store(grad_x + at, passed, mask=here)
    if of_scale:
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(here, counts, 0.0), 0))


@triton.jit(do_not_specialize=['inner', 'many', 'chunks'])
def _uniform_gradients(grad, x, keep, grad_x, sums, scale, zero, low, high, each, inner, many,
                       chunks, of_x: tl.constexpr, of_scale: tl.constexpr, drops: tl.constexpr,
                       several: tl.constexpr, block: tl.constexpr):
    of, at, here = _places(each, inner, many, chunks, several, block)
    size, zero = tl.load(scale + of), tl.load(zero + of)
    found = tl.load(x + at, mask=here, other=0.0)
    got = tl.load(grad + at, mask=here, other=0.0)
    inside = (found > (low - 0.5 - zero) * size) & (found < (high + 0.5 - zero) * size)
    passed = tl.where(inside, got, 0.0)
    counts = got * _uniform(found, size, zero, low, high) - passed * found
    _finish(passed, counts, got, at, here, keep, grad_x, sums, of_x, of_scale, drops)


@triton.jit(do_not_specialize=['inner', 'many', 'chunks'])
def _log_gradients(grad, x, values, keep, grad_x, sums, scale, steps, last, shift, each, inner,
                   many, chunks, of_x: tl.constexpr, of_scale: tl.constexpr, drops: tl.constexpr,
                   several: tl.constexpr, block: tl.constexpr):
    of, at, here = _places(each, inner, many, chunks, several, block)
    size, octave = tl.load(scale + of), tl.load(steps + of)
    found = tl.maximum(tl.load(x + at, mask=here, other=1.0) + shift, TINY, NAN)
    got = tl.load(grad + at, mask=here, other=0.0)
    product = (tl.load(values + at, mask=here, other=0.0) + shift) * got
    # a little beyond both ends, which themselves are inside
    low = tl.exp2(-tl.div_rn(last, octave)) * (1 - 1e-6) * size
    inside = (found > low) & (found < size * (1 + 1e-6))
    kept = tl.where(inside, product, 0.0)
    _finish(tl.div_rn(kept, found), product - kept, got, at, here, keep, grad_x, sums, of_x,
            of_scale, drops)
