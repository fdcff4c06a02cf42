"""Logarithmic quantizers, for values whose density falls like a power: softmax, GELU."""
import torch

from ..registry import QUANTIZERS
from . import functional as F
from . import search
from .base import Quantizer


class LogQuantizer(Quantizer):
    """Levels scale * 2**(-code / steps) - shift; `spec.zero_below` says what lies below them.

    A subclass has `steps_per_octave`: a number, or a tensor of one a scale where calibration
    chooses them.
    """

    @property
    def known_steps(self):
        """Steps an octave that calibration does not search, or None."""
        return None if torch.is_tensor(self.steps_per_octave) else self.steps_per_octave

    @torch.no_grad()
    def levels(self):
        codes = torch.arange(2**self.bits - 1, -1, -1.0)
        scale, steps = (value.cpu()[:, None] for value in self._grid())
        return F.log_decode(codes, scale, self.bits, steps, self.spec.zero_below) - self.spec.shift

    def fake_quantize(self, x, keep=None):
        return F.LogFakeQuantize.apply(
            x, self.spread(self.scale, x), self.spec.bits,
            self.known_steps or self.spread(self.steps_per_octave, x), self.spec.zero_below,
            self.spec.shift, keep)

    def set_grid(self, scale, steps_per_octave):
        """Take scales and steps an octave, each (size,); marks the quantizer calibrated."""
        self.set_scale(scale)

    def calibrate(self, samples, method, extremes=None):
        shift = self.spec.shift
        found = search.search_log_grid(
            samples + shift, self.spec, self.known_steps,
            extremes and tuple(value + shift for value in extremes))
        self.set_grid(*(value.to(self.log_scale) for value in found))

    def refine(self, inputs, weight, again=False):
        self.set_grid(*search.refine_log_grid(
            inputs + self.spec.shift, weight, *self._grid(), self.spec, self.known_steps, again))

    def refine_by(self, error, low, high, again=False):
        top = (high + self.spec.shift).clamp(min=1e-8)
        coarse = () if again else search.log_grids(top, self.spec, self.known_steps)
        self._refine_by(error, self.set_grid, self._grid(), coarse,
                        search.near_log(self.known_steps))

    def _grid(self):
        """Scales and steps an octave, each (size,)."""
        scale = self.scale
        return scale, torch.as_tensor(self.steps_per_octave).to(scale).expand_as(scale).clone()


@QUANTIZERS.register_module(name='log2')
class Log2Quantizer(LogQuantizer):
    """Powers of two: scale * 2**-code."""

    steps_per_octave = 1


@QUANTIZERS.register_module(name='log_sqrt2')
class LogSqrt2Quantizer(LogQuantizer):
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
        if not torch.isfinite(steps_per_octave).all() or (steps_per_octave <= 0).any():
            raise ValueError('steps an octave must be positive and finite')
        super().set_grid(scale, steps_per_octave)
        self.steps_per_octave.copy_(steps_per_octave)
