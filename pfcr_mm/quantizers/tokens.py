"""The quantizer of class tokens, which are unlike the patches beside them."""
import torch

from .uniform import UniformQuantizer


class TokenQuantizer(UniformQuantizer):
    """Uniform quantizer of the first tokens of a sequence, each about a centre of its own.

    A class token differs little from image to image and lies far from all patches: their grid
    has few levels where it varies. So its values are taken about a centre c, with a step and a
    zero point of each token: x^ = w Q((x - c) / w) + c. In integers the step is a factor of the
    token's row, and what a linear layer makes of c a bias of that row.

    The widths w (C,) are those of channels, up to a factor, where all other tokens are quantized
    channel-wise, else 1: reparameterisation then keeps the codes. The quantizer itself sees
    (x - c) / w, which `to_grid` gives.

    Args:
        spec (QuantizerSpec): of kind 'uniform'.
        tokens (int): first along axis 1 of (B, N, C).
        channels (int): C.
    """

    def __init__(self, spec, tokens, channels):
        super().__init__(spec, tokens, axis=1)
        self.register_buffer('centre', torch.zeros(tokens, channels))

    @property
    def tokens(self):
        """How many there are."""
        return len(self.centre)

    def to_grid(self, x, widths=None):
        """(x - c) / w of tokens (B, tokens, C); `widths` (C,), or None for 1."""
        moved = x - self.centre
        return moved if widths is None else moved / widths

    def from_grid(self, values, widths=None):
        """Tokens (B, tokens, C) of what `to_grid` gave."""
        return (values if widths is None else values * widths) + self.centre

    @torch.no_grad()
    def fit(self, tokens, weight, widths=None):
        """Set centres to the means of tokens, and steps to the least error of a layer's output.

        Args:
            tokens (Tensor): (n, tokens, C), float.
            weight (Tensor): of the layer that reads them (out, C).
            widths (Tensor | None): (C,).

        Returns:
            Tensor: the mean squared error of the output, (tokens,).
        """
        self.centre.copy_(tokens.mean(0))
        values = self.to_grid(tokens, widths)
        by_token = self.by_scale(values)
        self.calibrate(by_token, 'mse')

        def error():
            found = self.from_grid(self.fake_quantize(values), widths)
            return ((found - tokens) @ weight.t()).square().mean((0, 2))

        self.refine_by(error, by_token.amin(1), by_token.amax(1))
        return error()

    @torch.no_grad()
    def fold(self, ratio, shift):
        """Follow tokens that become x / ratio - shift, (C,) each; see `reparameterise`."""
        self.centre.div_(ratio).sub_(shift)
