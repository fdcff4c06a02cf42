"""Swin Transformer of timm: quantized window attention, chain, post-norm pairs."""
import torch
from timm.layers import Mlp
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import nn

from ..modules import QuantMatmul
from ..registry import CHAINS, CONVERTERS, POST_NORM, QUERY_KEYS, VALUE_PROJECTIONS
from .chain import Chain, Leaf, State
from .convert import quantize_matmuls, skipped_matmuls
from .swin import window_query_keys, window_value_projection

_SWIN = 'timm.models.swin_transformer'


class QuantTimmWindowAttention(WindowAttention):
    """Window attention whose two matmuls quantize q, k, the softmax output and v.

    The arithmetic is that of timm without fused kernels; the relative position bias and
    the mask are added in float, after the first matmul.
    """

    def forward(self, x, mask=None, valid=None):
        """Attend within windows.

        Args:
            x (Tensor): (windows * B, N, C).
            mask (Tensor | None): (windows, N, N), 0 or -100.
            valid (Tensor | None): (windows, N), False where a token is padding; only
                the statistics of calibration look at it.
        """
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(
            2, 0, 3, 1, 4).unbind(0)
        attention = self.matmul_qk(q * self.scale, k.transpose(-2, -1))
        attention = attention + self._get_rel_pos_bias()
        if mask is not None:
            attention = attention.view(-1, mask.shape[0], self.num_heads, tokens, tokens)
            attention = (attention + mask[None, :, None]).view(-1, self.num_heads, tokens, tokens)
        attention = self.attn_drop(self.softmax(attention))
        if isinstance(self.matmul_av, QuantMatmul):
            self.matmul_av.left_quantizer.valid_rows = valid
        x = self.matmul_av(attention, v).transpose(1, 2).reshape(batch, tokens, -1)
        return self.proj_drop(self.proj(x))


class QuantTimmSwinBlock(SwinTransformerBlock):
    """A Swin block of timm that pads with `pad_value` instead of zero.

    timm, like mmdet, pads after norm1 and does not mask the padding out, so what it
    stands for has to move along when scales are folded into norm1.
    """

    def _attn(self, x):
        batch, height, width, channels = x.shape
        shifted = any(self.shift_size)
        if shifted:
            x = torch.roll(x, [-s for s in self.shift_size], (1, 2))
        padded_h, padded_w = (side + -side % size
                              for side, size in zip((height, width), self.window_size))
        valid = None
        if (padded_h, padded_w) != (height, width):
            padded = self.pad_value.to(x).expand(batch, padded_h, padded_w, -1).clone()
            padded[:, :height, :width] = x
            x = padded
            valid = torch.zeros(1, padded_h, padded_w, 1, dtype=torch.bool, device=x.device)
            valid[:, :height, :width] = True
            valid = window_partition(valid, self.window_size).view(-1, self.window_area)
        windows = window_partition(x, self.window_size).view(-1, self.window_area, channels)
        mask = self.get_attn_mask(x) if self.dynamic_mask else self.attn_mask
        windows = self.attn(windows, mask, valid).view(-1, *self.window_size, channels)
        x = window_reverse(windows, self.window_size, padded_h, padded_w)[:, :height, :width]
        return torch.roll(x, self.shift_size, (1, 2)) if shifted else x.contiguous()


@CONVERTERS.register(f'{_SWIN}.SwinTransformerBlock')
def convert_block(block, name, quant):
    """Give a block its movable padding, in place."""
    if type(block) is SwinTransformerBlock \
            and type(block.attn).forward is WindowAttention.forward:
        block.__class__ = QuantTimmSwinBlock
        block.register_buffer('pad_value', torch.zeros(block.dim))
    return []


@CONVERTERS.register(f'{_SWIN}.WindowAttention')
def convert_window_attention(attention, name, quant):
    """Give a window attention its quantized matmuls, in place; census records of both."""
    if type(attention).forward is not WindowAttention.forward:
        return skipped_matmuls(attention, name)
    attention.__class__ = QuantTimmWindowAttention
    attention.fused_attn = False
    return quantize_matmuls(attention, name, quant)


@POST_NORM.register(f'{_SWIN}.SwinTransformerBlock')
def block_pairs(block):
    """(norm, linear, what holds the padding that follows) of a block."""
    if not isinstance(block, QuantTimmSwinBlock):
        return []
    pairs = []
    if isinstance(block.attn, QuantTimmWindowAttention) and _foldable(block.norm1):
        pairs.append((block.norm1, block.attn.qkv, block))
    if type(block.mlp) is Mlp and _foldable(block.norm2):
        pairs.append((block.norm2, block.mlp.fc1, None))
    return pairs


@POST_NORM.register(f'{_SWIN}.PatchMerging')
def merging_pairs(merging):
    """(norm, linear, None); merging pads before its norm, so nothing follows."""
    return [(merging.norm, merging.reduction, None)] if _foldable(merging.norm) else []


VALUE_PROJECTIONS.register(f'{__name__}.QuantTimmWindowAttention')(window_value_projection)
QUERY_KEYS.register(f'{__name__}.QuantTimmWindowAttention')(window_query_keys)


def _foldable(norm):
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


@CHAINS.register(f'{_SWIN}.SwinTransformer')
def timm_swin_chain(swin):
    """Leaves: patches; patch mergings; attention and MLP of each block; norm and head.

    State: a map of tokens (B, H, W, C), at last the logits (B, classes). timm merges at
    the start of a stage.
    """
    blocks = [block for stage in swin.layers for block in stage.blocks]
    if not all(type(block).forward is SwinTransformerBlock.forward for block in blocks):
        return None

    def classify(state):
        return State((swin.forward_head(swin.norm(state.tensors[0])), )), ()

    leaves = [Leaf('patch_embed', _apply(swin.patch_embed), (swin.patch_embed, ), letter='E')]
    number = 0
    for i, stage in enumerate(swin.layers):
        if not isinstance(stage.downsample, nn.Identity):
            leaves.append(Leaf(f'layers.{i}.downsample', _apply(stage.downsample),
                               (stage.downsample, ), stage=i, letter='D'))
        for j, block in enumerate(stage.blocks):
            name = f'layers.{i}.blocks.{j}'
            place = dict(block=number, stage=i)
            leaves += [
                Leaf(f'{name}.attn', _attention(block), (block.norm1, block.attn), **place,
                     letter='A'),
                Leaf(f'{name}.mlp', _mlp(block), (block.norm2, block.mlp), **place, letter='M')
            ]
            number += 1
    leaves.append(Leaf('head', classify, (swin.norm, swin.head)))
    return Chain('backbone', leaves, channel_axis=-1, gives='logits')


def _apply(module):

    def forward(state):
        return State((module(state.tensors[0]), )), ()

    return forward


def _attention(block):

    def forward(state):
        x, = state.tensors
        return State((x + block.drop_path1(block._attn(block.norm1(x))), )), ()

    return forward


def _mlp(block):

    def forward(state):
        x, = state.tensors
        # over a sequence, as timm does
        tokens = x.flatten(1, 2)
        tokens = tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
        return State((tokens.view_as(x), )), ()

    return forward
