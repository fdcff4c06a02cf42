"""The quantizer of class tokens, which are unlike the patches beside them."""
import torch
from torch import nn

from .uniform import UniformQuantizer


class TokenQuantizer(UniformQuantizer):
    """Uniform quantizer of the first tokens of a sequence, each about a centre of its own.

    A class token differs little from image to image and lies far from all patches: their grid
    has few levels where it varies. So what a linear layer makes of its centre c is a bias of
    the token's own, and x - c is quantized, with a step and a zero point of each token:
    W x + b = W (x - c) + (W c + b), in integers a factor and a bias of the token's row. The
    error of a quantized W is not multiplied by c.

    The widths w (C,) are those of channels, up to a factor, where all other tokens are quantized
    channel-wise, else 1: reparameterisation then keeps the codes. The quantizer itself sees
    (x - c) / w.

    Args:
        spec (QuantizerSpec): of kind 'uniform'.
        tokens (int): first along axis 1 of (B, N, C).
        channels (int): C.
        outputs (int): of the layer.
    """

    def __init__(self, spec, tokens, channels, outputs):
        super().__init__(spec, tokens, axis=1)
        self.register_buffer('centre', torch.zeros(tokens, channels))
        self.bias = nn.Parameter(torch.zeros(tokens, outputs), requires_grad=False)

    @property
    def tokens(self):
        """How many there are."""
        return len(self.centre)

    def about_centre(self, x, widths=None, quantize=None):
        """x - c of tokens (B, tokens, C), quantized.

        Args:
            x (Tensor): (B, tokens, C).
            widths (Tensor | None): (C,), None for 1.
            quantize (Callable | None): in place of the quantizer as it is switched.
        """
        quantize = quantize or self
        moved = x - self.centre
        return quantize(moved) if widths is None else quantize(moved / widths) * widths

    @torch.no_grad()
    def fit(self, tokens, weight, bias=None, widths=None):
        """Set centres to the means of tokens, and steps to the least error of a layer's output.

        Args:
            tokens (Tensor): (n, tokens, C), float.
            weight (Tensor): of the layer that reads them (outputs, C).
            bias (Tensor | None): of it.
            widths (Tensor | None): (C,).

        Returns:
            Tensor: the mean squared error of the output, (tokens,).
        """
        self.centre.copy_(tokens.mean(0))
        self.bias.copy_(nn.functional.linear(self.centre, weight, bias))
        moved = tokens - self.centre
        by_token = self.by_scale(moved if widths is None else moved / widths)
        self.calibrate(by_token, 'mse')

        def error():
            found = self.about_centre(tokens, widths, self.fake_quantize)
            return ((found - moved) @ weight.t()).square().mean((0, 2))

        self.refine_by(error, by_token.amin(1), by_token.amax(1))
        return error()

    @torch.no_grad()
    def fold(self, ratio, shift):
        """Follow tokens that become x / ratio - shift, (C,) each; see `reparameterise`."""
        self.centre.div_(ratio).sub_(shift)
