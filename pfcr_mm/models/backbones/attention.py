"""timm's attention with its matmuls as modules, over a sequence or over a map of tokens."""
import torch
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias
from torch import nn

from ...modules import Matmul, QuantMatmul


class MatmulAttention(Attention):
    """timm's `Attention`, its two matrix products being the modules `matmul_qk` and `matmul_av`.

    Parameters and the order of arithmetic are those of timm without fused kernels; so
    quantizing it is a matter of the two modules. Made of a timm attention by `adopt`.
    """

    @classmethod
    def adopt(cls, attention):
        """Turn a timm `Attention` into this class, in place; parameters stay."""
        attention.__class__ = cls
        attention.fused_attn = False
        attention.matmul_qk = Matmul()
        attention.matmul_av = Matmul()
        return attention

    def forward(self, x, attn_mask=None, is_causal=False):
        """Args: x (B, N, C), its class and register tokens included. Returns: the same shape."""
        if attn_mask is not None or is_causal:
            raise ValueError('attention with a mask is not supported')
        return self.attend(x)

    def attend(self, x, position_bias=None, valid=None):
        """Attend among all tokens of a sequence.

        Args:
            x (Tensor): (B, N, C).
            position_bias (Callable | None): q (B, heads, N, d), unscaled, to what is
                added to the logits (B, heads, N, N).
            valid (Tensor | None): (windows, N), False where a token is padding; only
                the statistics of calibration look at it.
        """
        batch, tokens, _ = x.shape
        gate = None if self.gate is None else self.gate(x).sigmoid()
        q, k, v = self.qkv(x).reshape(
            batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        attention = self.matmul_qk(q * self.scale, k.transpose(-2, -1))
        if position_bias is not None:
            attention = attention + position_bias(q)
        attention = self.attn_drop(attention.softmax(dim=-1))
        if isinstance(self.matmul_av, QuantMatmul):
            self.matmul_av.left_quantizer.valid_rows = valid
        x = self.matmul_av(attention, v).transpose(1, 2).reshape(batch, tokens, self.attn_dim)
        x = self.norm(x)
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


class GridAttention(MatmulAttention):
    """Attention over a map of tokens, global or within windows, as ViTDet has it.

    ViTDet (arXiv 2203.16527) pads the map after norm1 to a multiple of the window and
    does not mask the padding out. What padding stands for is the buffer `pad_value`,
    zero in a float model: folding scales into norm1 moves it.
    """

    @classmethod
    def adopt(cls, attention, window_size=0, rel_pos_size=None):
        """Turn a timm `Attention` into this class, in place; parameters stay.

        Args:
            attention (Attention): of timm.
            window_size (int): tokens along a window's side; 0 attends globally.
            rel_pos_size (int | None): adds tables of relative positions (zeros), for a
                map or window of so many tokens a side; other sizes are interpolated.
        """
        super().adopt(attention)
        attention.window_size = window_size
        if window_size:
            attention.register_buffer(
                'pad_value', torch.zeros(attention.qkv.in_features), persistent=False)
        for name in ('rel_pos_h', 'rel_pos_w'):
            table = nn.Parameter(torch.zeros(2 * rel_pos_size - 1, attention.head_dim)) \
                if rel_pos_size else None
            attention.register_parameter(name, table)
        return attention

    def forward(self, x, attn_mask=None, is_causal=False):
        """Args: x (B, H, W, C). Returns: the same shape."""
        if attn_mask is not None or is_causal:
            raise ValueError('attention with a mask is not supported')
        batch, height, width, channels = x.shape
        if not self.window_size:
            x = self.attend(x.flatten(1, 2), self._position_bias(height, width))
            return x.view(batch, height, width, -1)
        size = self.window_size
        rows, columns = -(-height // size), -(-width // size)
        windows = self._padded(x, rows * size, columns * size).view(
            batch, rows, size, columns, size, channels).transpose(2, 3)
        windows = self.attend(
            windows.reshape(-1, size * size, channels), self._position_bias(size, size),
            self._valid_tokens(height, width, rows, columns, x.device))
        x = windows.view(batch, rows, columns, size, size, -1).transpose(2, 3)
        x = x.reshape(batch, rows * size, columns * size, -1)
        return x[:, :height, :width]

    def _padded(self, x, height, width):
        """`x` (B, H, W, C) filled up with `pad_value` on the right and below."""
        if x.shape[1:3] == (height, width):
            return x
        padded = self.pad_value.to(x).expand(x.shape[0], height, width, -1).clone()
        padded[:, :x.shape[1], :x.shape[2]] = x
        return padded

    def _valid_tokens(self, height, width, rows, columns, device):
        """(windows, N) booleans, or None where nothing is padded."""
        size = self.window_size
        if (height, width) == (rows * size, columns * size):
            return None
        valid = torch.zeros(rows * size, columns * size, dtype=torch.bool, device=device)
        valid[:height, :width] = True
        return valid.view(rows, size, columns, size).transpose(1, 2).reshape(-1, size * size)

    def _position_bias(self, height, width):
        """Function of q to its decomposed relative positions, in float; None without tables."""
        if self.rel_pos_h is None:
            return None

        def bias(q):
            with q.device:  # timm makes places on the CPU, which a GPU would wait for
                found = get_decomposed_rel_pos_bias(
                    q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, (height, width),
                    (height, width))
            return found.view(*q.shape[:3], height * width)

        return bias
