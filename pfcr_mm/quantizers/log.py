"""Logarithmic quantizers for values in [0, scale], such as softmax outputs."""
from ..registry import QUANTIZERS
from . import functional as F
from .base import Quantizer


@QUANTIZERS.register_module(name='log2')
class Log2Quantizer(Quantizer):
    """Powers of two: scale * 2**-code."""

    steps_per_octave = 1

    def fake_quantize(self, x):
        return F.LogFakeQuantize.apply(
            x, self.spread(self.scale, x), self.spec.bits, self.steps_per_octave,
            self.spec.zero_below)


@QUANTIZERS.register_module(name='log_sqrt2')
class LogSqrt2Quantizer(Log2Quantizer):
    """Powers of the square root of two: scale * 2**(-code / 2) (RepQ-ViT)."""

    steps_per_octave = 2
