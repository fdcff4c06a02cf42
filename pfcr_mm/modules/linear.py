"""Quantized `nn.Linear`."""
import torch
import torch.nn.functional as F
from torch import nn

from .base import QuantLayer, random_rows


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` with a quantized weight (out, in) and input (..., in).

    Of a sequence (B, N, in) the first tokens may have a quantizer of their own,
    `token_quantizer`, with a bias; the input quantizer and `bias` are for the others then.
    """

    def forward(self, x):
        own, weight = self.token_quantizer, self.quantized_weight()
        if own is None or not own.enabled or x.dim() != 3:
            return F.linear(self.input_quantizer(x), weight, self.bias)
        tokens, others = x[:, :own.tokens], x[:, own.tokens:]
        return torch.cat([
            F.linear(own.about_centre(tokens, self.channel_widths()), weight) + own.bias,
            F.linear(self.input_quantizer(others), weight, self.bias)], 1)

    def channel_widths(self):
        """Steps of a channel-wise input quantizer by their mean (in,); None for one step."""
        if self.input_quantizer.axis is None:
            return None
        scale = self.input_quantizer.scale.detach()
        return scale / scale.mean()

    def weight_rows(self):
        return self.weight

    def input_rows(self, x, generator, limit):
        return random_rows(x.reshape(-1, x.shape[-1]), generator, limit)
