"""Values and gradients of quantizers, each fused to one loop by torch.compile.

The same functions as in `eager.py`, as the formulas stand; the compiler may round otherwise, and
sums in another order. The first call of each compiles, which takes a C++ compiler on a CPU and
Triton on a GPU.
"""
from contextlib import contextmanager

import torch

from ..errors import UsageError
from . import functional
from .blocks import joined, mixed, parted
from .eager import TINY


@contextmanager
def fused_kernels(on=True):
    """Within the block, if `on`, quantizers of the process compute with fused kernels.

    But for those with fractional zero points and for AdaRound's weights.
    """
    before = functional.kernels
    functional.kernels = _Fused if on else before
    try:
        yield
    finally:
        functional.kernels = before


class _Fused:
    """What stands in for the module `native`."""

    @staticmethod
    def uniform_values(x, scale, zero_point, low, high, keep=None):
        return mixed(x, _values(_uniform_values, x, scale, zero_point, low, high), keep)

    @staticmethod
    def uniform_gradients(grad, x, values, scale, zero_point, low, high, keep=None, of_x=True,
                          of_scale=True):
        return _gradients(_uniform_gradients, grad, x, values, scale, zero_point, keep, of_x,
                          low, high, of_scale)

    @staticmethod
    def log_values(x, scale, steps, bits, zero_below, shift, known=None, keep=None):
        last = 2**bits - 1
        found = _values(_log_values, x, scale, steps, zero_below - last, last, zero_below, shift)
        return mixed(x, found, keep)

    @staticmethod
    def log_gradients(grad, x, values, scale, steps, last, shift, keep=None, of_x=True,
                      of_scale=True):
        return _gradients(_log_gradients, grad, x, values, scale, steps, keep, of_x, last, shift,
                          of_scale)


def _values(function, x, scale, other, *rest):
    layout = _Layout(x, scale)
    return layout.back(_run(function, *layout(x), *layout.scales(scale, other), *rest))


def _gradients(function, grad, x, values, scale, other, keep, of_x, *rest):
    layout, (grad, passed) = _Layout(x, scale), parted(grad, keep)
    grad_x, grad_scale = _run(
        function, *layout(grad, x, values), *layout.scales(scale, other), *rest)
    grad_x = joined(layout.back(grad_x), passed) if of_x else None
    return grad_x, layout.scale_back(grad_scale)


class _Layout:
    """Takes tensors to the order of axes in which the first lies in memory, and back.

    With one scale all are flat. So few kernels serve all tensors there are.
    """

    def __init__(self, x, scale):
        self.shape, self.scale_shape, self.flat = x.shape, scale.shape, scale.numel() == 1
        self.aligned = (1, ) * (x.dim() - scale.dim()) + scale.shape
        self.order = sorted(range(x.dim()), key=lambda axis: -x.stride(axis))

    def __call__(self, *tensors):
        found = [t.detach().permute(self.order).contiguous() for t in tensors]
        return [t.view(-1) for t in found] if self.flat else found

    def scales(self, *tensors):
        return [t.detach().reshape(1) if self.flat
                else t.detach().reshape(self.aligned).permute(self.order) for t in tensors]

    def back(self, x):
        if self.flat:
            x = x.view([self.shape[axis] for axis in self.order])
        return x.permute(self._inverse())

    def scale_back(self, scale):
        scale = scale if self.flat else scale.permute(self._inverse())
        return scale.reshape(self.scale_shape)

    def _inverse(self):
        return [self.order.index(axis) for axis in range(len(self.order))]


def _uniform_values(x, scale, zero_point, low, high):
    return ((x / scale).round().add(zero_point).clamp(low, high) - zero_point) * scale


def _uniform_gradients(grad, x, values, scale, zero_point, low, high, of_scale=True):
    codes = x / scale + zero_point
    inside = (codes > low - 0.5) & (codes < high + 0.5)
    grad_x = torch.where(inside, grad, 0.0)
    if not of_scale:
        return grad_x, torch.zeros_like(scale)
    return grad_x, (grad * values - grad_x * x).sum_to_size(scale.shape) / scale


def _log_values(x, scale, steps, least, last, zero_below, shift):
    power = ((x + shift) / scale).clamp(0.0, 1.0).log2() * steps
    codes = power.round().clamp(least, 0)
    values = (codes / steps).exp2() * scale
    if zero_below:
        values = torch.where(power <= -last, 0.0, values)
    return values - shift


def _log_gradients(grad, x, values, scale, steps, last, shift, of_scale=True):
    shifted = (x + shift).clamp(min=TINY)
    ratio = shifted / scale
    product = (values + shift) * grad
    inside = (ratio > torch.exp2(-last / steps) * (1 - 1e-6)) & (ratio < 1 + 1e-6)
    kept = torch.where(inside, product, 0.0)
    if not of_scale:
        return kept / shifted, torch.zeros_like(scale)
    return kept / shifted, (product - kept).sum_to_size(scale.shape) / scale


_compiled = {}
_VARIANTS = 64  # of a kernel: ranks and layouts of tensors, one or many scales; torch allows 8


def _run(function, *args):
    """Call what torch.compile makes of a function; sizes may change from call to call."""
    options = torch._dynamo.config  # of this thread; a GPU's backward has its own
    if options.cache_size_limit < _VARIANTS:
        options.cache_size_limit = _VARIANTS
    try:
        if function not in _compiled:
            _compiled[function] = torch.compile(function, dynamic=True, fullgraph=True)
        return _compiled[function](*args)
    except torch._dynamo.exc.TorchDynamoException as error:
        why = getattr(error, 'inner_exception', error)
        if isinstance(why, torch.OutOfMemoryError):
            raise why from None
        told = f'{type(why).__name__}: {why}'.splitlines()[0]
        raise UsageError(
            f'torch.compile fails here ({told}); compile=True takes a C++ compiler on a CPU and '
            'Triton on a GPU, leave it out to go without') from None
