"""The uniform affine quantizer."""
import torch

from ..registry import QUANTIZERS
from . import functional as F
from . import search
from .base import Quantizer


@QUANTIZERS.register_module(name='uniform')
class UniformQuantizer(Quantizer):
    """Uniform affine quantizer with an integer zero point: exactly 2**bits levels."""

    @property
    def code_range(self):
        """Lowest and highest code."""
        return F.uniform_code_range(self.spec.bits, self.spec.symmetric)

    def fake_quantize(self, x, keep=None):
        function = (F.UniformFakeQuantize.apply if self.spec.integer_zero_point
                    else F.fractional_fake_quantize)
        return function(x, self.spread(self.scale, x), self.spread(self.zero_point, x),
                        *self.code_range, keep)

    @torch.no_grad()
    def encode(self, x):
        """Integer codes of `x`, as a float tensor."""
        return F.uniform_encode(
            x, self.spread(self.scale, x), self.spread(self.zero_point, x), *self.code_range)

    @torch.no_grad()
    def decode(self, codes):
        """Values of integer `codes`."""
        return F.uniform_decode(
            codes, self.spread(self.scale, codes), self.spread(self.zero_point, codes))

    @torch.no_grad()
    def levels(self):
        low, high = self.code_range
        return F.uniform_decode(
            torch.arange(low, high + 1.0), self.scale.cpu()[:, None],
            self.zero_point.cpu()[:, None])

    def calibrate(self, samples, method, extremes=None):
        found = search.search_range(samples, self.spec, method, extremes)
        self.set_scale(*(value.to(self.log_scale) for value in found))

    def refine(self, inputs, weight, again=False):
        self.set_scale(*search.refine_activation(
            inputs, weight, self.scale, self.zero_point, self.spec, again))

    def refine_by(self, error, low, high, again=False):
        coarse = () if again else search.uniform_grids(low, high, self.spec)
        self._refine_by(error, self.set_scale, (self.scale, self.zero_point.clone()), coarse,
                        search.near_uniform(self.spec))
