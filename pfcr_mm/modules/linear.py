"""Quantized `nn.Linear`."""
import torch
import torch.nn.functional as F
from torch import nn

from .base import QuantLayer, random_rows


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` with a quantized weight (out, in) and input (..., in).

    Of a sequence (B, N, in) the first tokens may have a quantizer of their own,
    `token_quantizer`; the input quantizer is for the others then.
    """

    def forward(self, x):
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)

    def quantized_input(self, x):
        """The input that the forward pass uses."""
        own = self.token_quantizer
        if own is None or not own.enabled or x.dim() != 3:
            return self.input_quantizer(x)
        tokens, others = x[:, :own.tokens], x[:, own.tokens:]
        return torch.cat([self.quantized_tokens(tokens, own), self.input_quantizer(others)], 1)

    def quantized_tokens(self, tokens, quantize):
        """The first tokens (B, n, in) as the forward pass uses them.

        Args:
            tokens (Tensor): (B, n, in).
            quantize (Callable): the token quantizer, or a method of it.
        """
        own, widths = self.token_quantizer, self.channel_widths()
        return own.from_grid(quantize(own.to_grid(tokens, widths)), widths)

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
