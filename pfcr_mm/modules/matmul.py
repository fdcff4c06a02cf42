"""Matrix products of two activations, as attention has them: float and quantized."""
from torch import nn

from ..quantizers import build_quantizer


class Matmul(nn.Module):
    """left @ right in float: a place for `QuantMatmul`, or where quantization is excluded."""

    def forward(self, left, right):
        return left @ right


class QuantMatmul(nn.Module):
    """left @ right with a quantizer on each operand.

    Args:
        left, right (QuantizerSpec): per-tensor or per-head specs.
        heads (int): number of heads.
        axis (int): axis of the heads in both operands, e.g. 1 for (B, heads, N, C).

    Left operands may have a centre c, see `give_centre`: (Q(left - c) + c) @ Q(right).
    """
    def __init__(self, left, right, heads, axis=1):
        super().__init__()
        self.heads = heads
        self.register_buffer('left_centre', None)  # (heads, 1, C)
        self.left_quantizer = self._build(left, heads, axis)
        self.right_quantizer = self._build(right, heads, axis)

    @staticmethod
    def _build(spec, heads, axis):
        per_head = spec.granularity == 'head'
        return build_quantizer(spec, heads if per_head else 1, axis if per_head else None)

    def give_centre(self, channels):
        """Quantize left operands about a centre, zero at first, in place.

        What all rows have in common then takes none of the levels. In integers c @ Q(right) is a
        term of each column, as a zero point has one.

        Args:
            channels (int): C of left operands (B, heads, N, C).
        """
        self.left_centre = self.left_quantizer.log_scale.new_zeros(self.heads, 1, channels)

    def from_centre(self, left):
        """What the left quantizer is given."""
        return left if self.left_centre is None else left - self.left_centre

    def quantize_left(self, left, quantize=None):
        """Left operands, quantized.

        Args:
            left (Tensor): (B, heads, N, C).
            quantize (Callable | None): in place of the left quantizer as it is switched.
        """
        left = (quantize or self.left_quantizer)(self.from_centre(left))
        return left if self.left_centre is None else left + self.left_centre

    def forward(self, left, right):
        return self.quantize_left(left) @ self.right_quantizer(right)


def real_rows(quantizer, weights):
    """Attention weights without the rows of padded queries, which say nothing of the image.

    Args:
        quantizer (Quantizer): of the weights; where windows are padded its `valid_rows`
            (windows, queries) says which queries of an image's windows are real.
        weights (Tensor): (B * windows, heads, queries, keys).

    Returns:
        Tensor: (B, heads, rows, keys); the weights as they are where nothing is padded.
    """
    valid = quantizer.valid_rows
    if valid is None:
        return weights
    windows = weights.view(-1, len(valid), *weights.shape[1:])  # (B, windows, heads, N, N)
    return windows.transpose(2, 3)[:, valid].transpose(1, 2)
