"""Values and gradients of quantizers in one pass each, by `native.c`, for float tensors on a CPU.

The same functions as in `eager.py`, which takes tensors of other types, and all of them where the
library was not built; those on a GPU go to `triton_kernels.py`. Uniform values are equal; a
logarithm within 1e-7 of the border of two codes may be rounded the other way.
"""
import ctypes
import functools
import importlib.util
import os
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

from ..errors import UsageError
from . import eager
from .blocks import dense_like, fit_together

VERSION = 1  # of the functions' arguments, as native.c has it
SHARE = 2**16  # numbers that are worth a thread
DIMS = 4


@functools.cache
def library():
    """The compiled functions, or None where `native.c` was not built.

    Raises:
        UsageError: they were built from other sources.
    """
    found = importlib.util.find_spec('pfcr_mm.quantizers._native')
    if found is None:
        return None
    functions = ctypes.CDLL(found.origin)
    if getattr(functions, f'pfcr_version_{VERSION}', None) is None:
        raise UsageError(f'{found.origin} is of another version of pfcr_mm; build it again: '
                         'make setup, or pip install')
    for name, (tensors, pointers, numbers) in dict(
            uniform_values=(4, 5, 2), uniform_gradients=(5, 7, 2), log_values=(4, 5, 2),
            log_gradients=(5, 8, 1)).items():
        function = getattr(functions, f'pfcr_{name}')
        function.argtypes = [
            *[ctypes.c_void_p] * (1 + tensors + pointers), *[ctypes.c_float] * numbers]
        function.restype = None
    return functions


def uniform_values(x, scale, zero_point, low, high, keep=None):
    if not _takes(x, keep, scale, zero_point):
        return _others(x).uniform_values(x, scale, zero_point, low, high, keep)
    values = dense_like(x)
    _Rows(values, scale, x, keep).run(
        library().pfcr_uniform_values, [values], [scale, zero_point], [low, high])
    return values


def uniform_gradients(grad, x, values, scale, zero_point, low, high, keep=None, of_x=True,
                      of_scale=True):
    if not _takes(x, keep, scale, zero_point):
        return _others(x).uniform_gradients(
            grad, x, values, scale, zero_point, low, high, keep, of_x, of_scale)
    grad_x = torch.empty_like(values) if of_x else None
    total = _Rows(values, scale, grad, x, keep).run(
        library().pfcr_uniform_gradients, [grad_x], [scale, zero_point], [low, high], summed=True)
    return grad_x, _of_scale(total, scale, of_scale)


def log_values(x, scale, steps, bits, zero_below, shift, known=None, keep=None):
    if not _takes(x, keep, scale, steps):
        return _others(x).log_values(x, scale, steps, bits, zero_below, shift, known, keep)
    values = dense_like(x)
    last, scales, steps = 2**bits - 1, scale.unsqueeze(-1), steps.unsqueeze(-1)
    codes = torch.arange(last + 1.0)
    levels = torch.exp2(codes / -steps).mul_(scales)
    borders = codes[1:] - 0.5
    if zero_below:
        levels[..., -1], borders[-1] = 0, last
    borders = torch.exp2(borders.double() / -steps).mul_(scales).float()
    _Rows(values, scale, x, keep).run(
        library().pfcr_log_values, [values], [borders, levels.sub_(shift)], [last + 1, shift])
    return values


def log_gradients(grad, x, values, scale, steps, last, shift, keep=None, of_x=True, of_scale=True):
    if not _takes(x, keep, scale, steps):
        return _others(x).log_gradients(
            grad, x, values, scale, steps, last, shift, keep, of_x, of_scale)
    grad_x = torch.empty_like(values) if of_x else None
    # a little beyond both ends, which themselves are inside
    ends = torch.exp2(-last / steps).mul_(1 - 1e-6).mul_(scale), scale * (1 + 1e-6)
    total = _Rows(values, scale, grad, x, keep).run(
        library().pfcr_log_gradients, [values, grad_x], ends, [shift], summed=True)
    return grad_x, _of_scale(total, scale, of_scale)


def _others(x):
    """The module for what this one does not do."""
    return (on_gpu() or eager) if x.is_cuda and not _is_traced() else eager


def _is_traced():
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@functools.cache
def on_gpu():
    """Kernels for a GPU, or None where Triton cannot be used, which is told."""
    try:
        from . import triton_kernels
        one = torch.ones(1, device='cuda')
        triton_kernels.uniform_values(one, one, one - 1, 0, 1)
    except Exception as error:  # no Triton, no C compiler, a GPU that is too old, ...
        told = f'{type(error).__name__}: {error}'.splitlines()[0]
        warnings.warn(f'quantizers on the GPU compute without Triton, which is slower: {told}',
                      stacklevel=2)
        return None
    return triton_kernels


def _takes(x, keep, scale, *others):
    """Whether this module does it; what does not fit together is left to PyTorch to refuse.

    Args:
        x (Tensor): on a CPU.
        keep, scale, others: see `fit_together`.
    """
    if library() is None or _is_traced():
        return False
    return x.device.type == 'cpu' and fit_together(x, keep, scale, *others)


def _of_scale(total, scale, wanted):
    return total.to(scale.dtype).div_(scale) if wanted else torch.zeros_like(scale)


class _Rows:
    """Tensors of one shape, row by row, with the scales that broadcast against them.

    Args:
        out (Tensor): dense, in the order of axes that rows are taken in.
        scale (Tensor): broadcasts against it.
        inputs (Tensor | None): shaped like it; one whose rows have gaps is copied.
    """

    def __init__(self, out, scale, *inputs):
        self.scale, self.inputs = scale, inputs
        lies = out.shape, _aligned(scale, out.dim()), out.stride()
        self.plan = _plan(*lies, *(_strides(t, out) for t in inputs))
        if self.plan is None:
            self.inputs = [_dense(t, out) if _plan(*lies, _strides(t, out)) is None else t
                           for t in inputs]
            self.plan = _plan(*lies, *(_strides(t, out) for t in self.inputs))
        if self.plan is None:  # none has gaps, but together they have too many axes
            self.inputs = [_dense(t, out) for t in inputs]
            self.plan = _plan(*lies, *[out.stride()] * len(inputs))
        self.pieces = max(1, min(torch.get_num_threads(), out.numel() // SHARE, self.plan.length))

    def run(self, function, outs, scales, numbers, summed=False):
        """Call a function of `native.c`, in as many threads as torch has.

        Args:
            outs (list[Tensor | None]): with the strides of `out`; None is not wanted.
            scales (list[Tensor]): of one or more numbers for each scale.
            numbers (list[float]): passed on.
            summed (bool): it adds up a number for each scale.

        Returns:
            Tensor: these sums, float64, shaped like the scale; None where nothing is.
        """
        plan, many = self.plan, self.scale.numel()
        scales = [t.contiguous() for t in scales]  # kept until all is done
        sums = torch.zeros((self.pieces, many), dtype=torch.float64) if summed else None
        # address, stride in bytes along the axis that is shared out
        places = [
            *map(_place, self.inputs, plan.steps[2:]), *(_place(t, plan.steps[1]) for t in outs),
            *(_place(t, plan.steps[0] * (t.numel() // many)) for t in scales)]

        def one(piece, start, stop):
            sizes = plan.sizes
            if self.pieces > 1:
                sizes = (ctypes.c_int64 * DIMS)(*sizes)
                sizes[plan.axis] = stop - start
            found = [address + start * step for address, step in places]
            if summed:
                found.append(sums.data_ptr() + 8 * (piece * many + start * plan.steps[0]))
            function(sizes, *plan.strides[2:], plan.strides[1], plan.strides[0], *found, *numbers)

        if self.pieces == 1:
            one(0, 0, plan.length)
            return sums.view(self.scale.shape) if summed else None
        ends = [plan.length * piece // self.pieces for piece in range(self.pieces + 1)]
        others = [_threads().submit(one, piece, *ends[piece:piece + 2])
                  for piece in range(1, self.pieces)]
        try:
            one(0, *ends[:2])
        finally:  # they write to what is freed behind us
            wait(others)
        for other in others:
            other.result()
        return sums.sum(0).view(self.scale.shape) if summed else None


class _Plan(NamedTuple):
    """How rows are gone through; strides of scales, outputs and inputs, in this order."""

    sizes: object  # of the axes, and
    strides: list  # of each tensor, as arrays of C
    axis: int  # that is shared out to threads
    length: int  # of it
    steps: list  # of each tensor along it


@functools.lru_cache(4096)
def _plan(shape, *strides):
    """A `_Plan`, or None where rows have gaps or axes are too many."""
    axes = [(1, [0] + [1] * (len(strides) - 1))] if max(shape, default=1) == 1 else []
    for i in sorted(range(len(shape)), key=lambda i: -strides[1][i]):
        count, steps = shape[i], [stride[i] for stride in strides]
        if count > 1 and axes and all(
                outer == inner * count for outer, inner in zip(axes[-1][1], steps)):
            axes[-1] = axes[-1][0] * count, steps
        elif count > 1:
            axes.append((count, steps))
    if len(axes) > DIMS or any(step != 1 for step in axes[-1][1][1:]):
        return None
    first = DIMS - len(axes)
    axes = [(1, [0] * len(strides))] * first + axes
    sizes, steps = zip(*axes)
    array = ctypes.c_int64 * DIMS
    return _Plan(array(*sizes), [array(*each) for each in zip(*steps)], first, sizes[first],
                 steps[first])


def _place(tensor, step):
    return (0, 0) if tensor is None else (tensor.data_ptr(), step * tensor.element_size())


def _strides(tensor, out):
    """Of an input; one that is None is gone through like `out`."""
    return (out if tensor is None else tensor).stride()


def _dense(tensor, out):
    """A copy of an input that lies like `out`."""
    return None if tensor is None else torch.empty_like(out, dtype=tensor.dtype).copy_(tensor)


def _aligned(scale, dims):
    """Strides of a scale without gaps along the axes that it broadcasts against."""
    strides, step = [], 1
    for count in reversed(scale.shape):
        strides.append(step if count > 1 else 0)
        step *= count
    return (0, ) * (dims - scale.dim()) + tuple(reversed(strides))


@functools.cache
def _threads():
    # masked softmax leaves 1e-44: such numbers cost a hundred cycles, and are zero on any grid
    return ThreadPoolExecutor(
        os.cpu_count(), initializer=torch.set_flush_denormal, initargs=(True, ))


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads are not forked
