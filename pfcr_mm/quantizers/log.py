"""Logarithmic quantizers, for values whose density falls like a power: softmax, GELU."""
import torch

from ..registry import QUANTIZERS
from . import functional as F
from . import search
from .base import Quantizer


class LogQuantizer(Quantizer):
    """Levels scale * 2**(-code / steps) - shift; `spec.zero_below` says what lies below them.

    A subclass has `steps_per_octave`: a number, or a tensor of one a scale.
    """

    @torch.no_grad()
    def levels(self):
        codes = torch.arange(2**self.bits - 1, -1, -1.0)
        steps = torch.as_tensor(self.steps_per_octave).cpu().expand(self.log_scale.shape)
        return F.log_decode(
            codes, self.scale.cpu()[:, None], self.bits, steps[:, None],
            self.spec.zero_below) - self.spec.shift


@QUANTIZERS.register_module(name='log2')
class Log2Quantizer(LogQuantizer):
    """Powers of two: scale * 2**-code."""

    steps_per_octave = 1

    def fake_quantize(self, x):
        if self.spec.shift:
            x = x + self.spec.shift
        values = F.LogFakeQuantize.apply(
            x, self.spread(self.scale, x), self.spec.bits, self.steps_per_octave,
            self.spec.zero_below)
        return values - self.spec.shift if self.spec.shift else values

    def calibrate(self, samples, method, extremes=None):
        scale = search.search_log_scale(
            samples + self.spec.shift, self.spec, self.steps_per_octave,
            _shifted(extremes, self.spec.shift))
        self.set_scale(scale.to(self.log_scale))


@QUANTIZERS.register_module(name='log_sqrt2')
class LogSqrt2Quantizer(Log2Quantizer):
    """Powers of the square root of two: scale * 2**(-code / 2) (RepQ-ViT)."""

    steps_per_octave = 2


@QUANTIZERS.register_module(name='adalog')
class AdaLogQuantizer(LogQuantizer):
    """Powers of a base that calibration chooses (Wu et al., AdaLog, arXiv 2407.12951).

    The base is any real number here, where the paper has powers of two over a common
    denominator. With `spec.shift` 0.17, GELU's minimum is the least value.
    """

    def __init__(self, spec, size=1, axis=None):
        super().__init__(spec, size, axis)
        self.register_buffer('steps_per_octave', torch.ones(size))

    @torch.no_grad()
    def set_grid(self, scale, steps_per_octave):
        """Take scales and steps an octave, each (size,); marks the quantizer calibrated."""
        if not torch.isfinite(steps_per_octave).all() or (steps_per_octave <= 0).any():
            raise ValueError('steps an octave must be positive and finite')
        self.set_scale(scale)
        self.steps_per_octave.copy_(steps_per_octave)

    def fake_quantize(self, x):
        return F.AdaLogFakeQuantize.apply(
            x, self.spread(self.scale, x), self.spread(self.steps_per_octave, x),
            self.spec.bits, self.spec.zero_below, self.spec.shift)

    def calibrate(self, samples, method, extremes=None):
        found = search.search_log_grid(
            samples + self.spec.shift, self.spec, _shifted(extremes, self.spec.shift))
        self.set_grid(*(value.to(self.log_scale) for value in found))

    def refine(self, inputs, weight):
        self.set_grid(*search.refine_log_grid(
            inputs + self.spec.shift, weight, self.scale, self.steps_per_octave, self.spec))


def _shifted(extremes, shift):
    return extremes and tuple(value + shift for value in extremes)
