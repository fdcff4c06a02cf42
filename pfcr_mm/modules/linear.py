"""Quantized `nn.Linear`."""
import torch.nn.functional as F
from torch import nn

from .base import QuantLayer, random_rows


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` with a quantized weight (out, in) and input (..., in)."""

    def forward(self, x):
        return F.linear(self.input_quantizer(x), self.quantized_weight(), self.bias)

    def weight_rows(self):
        return self.weight

    def input_rows(self, x, generator, limit):
        return random_rows(x.reshape(-1, x.shape[-1]), generator, limit)
