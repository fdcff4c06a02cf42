"""The straight step, as published code has it: what ours is measured against and equal to.

Every operation is a tensor operation of its own that autograd records: round, clamp, mask,
mix; the weight is quantized in every call, AdaRound's soft rounding recomputed. BRECQ
(`quant/quant_layer.py`) and QDrop read like this. Inputs of units are mixed as ours are.
"""
import copy
import types

import torch

from ..modules import QuantLayer, quantizers_of
from ..quantizers import AdaRound, LogQuantizer, functional
from ..quantizers.base import HALF


def straight_twin(model):
    """A copy of `model` whose quantizers and roundings are straight; states are shared by none."""
    twin = copy.deepcopy(model)
    for _, quantizer in quantizers_of(twin):
        log = isinstance(quantizer, LogQuantizer)
        quantizer.fake_quantize = types.MethodType(
            _log_fake_quantize if log else _uniform_fake_quantize, quantizer)
        quantizer.forward = types.MethodType(_forward, quantizer)
    for layer in twin.modules():
        if isinstance(layer, QuantLayer):
            layer.quantized_weight = types.MethodType(_quantized_weight, layer)
            if isinstance(layer.rounding, AdaRound):
                layer.rounding.forward = types.MethodType(_adaround, layer.rounding)
    return twin


def round_through(x):
    """Round with a straight-through gradient."""
    return (x.round() - x).detach() + x


def uniform(x, scale, zero_point, low, high):
    """Quantize-dequantize on a uniform grid."""
    codes = torch.clamp(round_through(x / scale) + zero_point, low, high)
    return (codes - zero_point) * scale


def logarithmic(x, scale, bits, steps_per_octave, zero_below):
    """Quantize-dequantize on the grid scale * 2**(-code / steps_per_octave).

    Steps are a number or a tensor that broadcasts.
    """
    last = 2**bits - 1
    ratio = (x / scale).clamp(max=1)
    steps_per_octave = torch.as_tensor(steps_per_octave, dtype=x.dtype)
    smallest = torch.exp2(-(last - zero_below) / steps_per_octave)
    exponent = -torch.log2(torch.maximum(ratio, smallest)) * steps_per_octave
    values = torch.exp2(-round_through(exponent) / steps_per_octave) * scale
    if zero_below:
        mask = ratio <= torch.exp2(-last / steps_per_octave)
        values = values.masked_fill(mask, 0.0)
    return values


def _uniform_fake_quantize(self, x):
    return uniform(x, self.spread(self.scale, x), self.spread(self.zero_point, x),
                   *functional.uniform_code_range(self.spec.bits, self.spec.symmetric))


def _log_fake_quantize(self, x):
    steps = self.known_steps or self.spread(self.steps_per_octave, x)
    return logarithmic(x + self.spec.shift, self.spread(self.scale, x), self.spec.bits, steps,
                       self.spec.zero_below) - self.spec.shift


def _forward(self, x):
    if not self.enabled:
        return x
    dtype = x.dtype
    if dtype in HALF:
        x = x.float()
    quantized = self.fake_quantize(x)
    if self.keep_prob < 1.0:
        quantized = torch.where(torch.rand_like(x) < self.keep_prob, quantized, x)
    return quantized.to(dtype)


def _quantized_weight(self):
    return self.weight if self.hardened else self.rounding(self.weight, self.weight_quantizer)


def _adaround(self, weight, quantizer):
    if not quantizer.enabled or self.v is None:
        return quantizer(weight)
    scale = quantizer.spread(quantizer.scale, weight)
    zero_point = quantizer.spread(quantizer.zero_point, weight)
    soft = torch.sigmoid(self.v) * (self.ZETA - self.GAMMA) + self.GAMMA
    up = torch.clamp(soft, 0, 1) if self.is_open else (self.v >= 0).float()
    codes = torch.floor(weight.detach() / scale.detach()) + up + zero_point
    codes = torch.clamp(codes, *quantizer.code_range)
    return (codes - zero_point) * scale
