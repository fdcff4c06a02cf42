"""Swin Transformer of mmdet: quantized window attention, chain, post-norm pairs."""
from functools import lru_cache

import torch
from mmdet.models.backbones.swin import ShiftWindowMSA, WindowMSA

from ..modules import QuantMatmul
from ..registry import (
    CHAINS,
    CONVERTERS,
    OUTPUT_NORMS,
    POST_NORM,
    QUERY_KEYS,
    VALUE_PROJECTIONS,
)
from .chain import Chain, Leaf, State
from .convert import quantize_matmuls, skipped_matmuls
from .recording import is_recorded

_SWIN = 'mmdet.models.backbones.swin'


class QuantWindowMSA(WindowMSA):
    """Window attention whose two matmuls quantize q, k, the softmax output and v.

    The relative position bias and the mask are added in float, after the first matmul.
    """

    def forward(self, x, mask=None, valid=None):
        """Attend within windows.

        Args:
            x (Tensor): (windows * B, N, C).
            mask (Tensor | None): (windows, N, N), 0 or -100.
            valid (Tensor | None): (windows, N), False where a token is padding; only
                the statistics of calibration look at it.
        """
        batch, tokens, channels = x.shape
        q, k, v = self.qkv(x).reshape(
            batch, tokens, 3, self.num_heads, channels // self.num_heads).permute(2, 0, 3, 1, 4)
        attention = self.matmul_qk(q * self.scale, k.transpose(-2, -1))
        bias = self._position_bias()
        if mask is not None:  # added to the bias first: both are small
            attention = attention.view(-1, len(mask), self.num_heads, tokens, tokens)
            bias = bias + mask[:, None]
        attention = (attention + bias).view(batch, self.num_heads, tokens, tokens)
        attention = self.attn_drop(self.softmax(attention))
        if isinstance(self.matmul_av, QuantMatmul):
            self.matmul_av.left_quantizer.valid_rows = valid
        x = self.matmul_av(attention, v).transpose(1, 2).reshape(batch, tokens, channels)
        return self.proj_drop(self.proj(x))

    def _position_bias(self):
        tokens = self.window_size[0] * self.window_size[1]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        return bias.view(tokens, tokens, -1).permute(2, 0, 1).unsqueeze(0)


class QuantShiftWindowMSA(ShiftWindowMSA):
    """Shifted window attention that pads with `pad_value` instead of zero.

    mmdet pads after norm1 and does not mask the padding out, so padded tokens take
    part in attention. Folding scales into norm1 moves what zero stands for: the
    padding has to move along, or border windows are wrong.
    """

    def forward(self, query, hw_shape):
        """Args: query (B, H*W, C), hw_shape (H, W). Returns: (B, H*W, C)."""
        batch, length, channels = query.shape
        height, width = hw_shape
        if length != height * width:
            raise ValueError(f'{length} tokens do not fill a {height}x{width} map')
        size = self.window_size
        padded_h, padded_w = height + -height % size, width + -width % size
        x = query.view(batch, height, width, channels)
        if (height, width) != (padded_h, padded_w):
            padded = self.pad_value.expand(batch, padded_h, padded_w, channels).clone()
            padded[:, :height, :width] = x
            x = padded

        mask = None
        if self.shift_size > 0:
            x = torch.roll(x, (-self.shift_size, -self.shift_size), (1, 2))
            mask = shift_mask(padded_h, padded_w, size, self.shift_size, x.device)
        windows = self.window_partition(x).view(-1, size * size, channels)
        windows = self.w_msa(
            windows, mask, self._valid_tokens(height, width, padded_h, padded_w, x.device))
        x = self.window_reverse(windows.view(-1, size, size, channels), padded_h, padded_w)
        if self.shift_size > 0:
            x = torch.roll(x, (self.shift_size, self.shift_size), (1, 2))
        x = x[:, :height, :width].reshape(batch, height * width, channels)
        return self.drop(x)

    def _valid_tokens(self, height, width, padded_h, padded_w, device):
        """(windows, N) booleans, or None where nothing is padded."""
        if (height, width) == (padded_h, padded_w):
            return None
        valid = torch.zeros((1, padded_h, padded_w, 1), dtype=torch.bool, device=device)
        valid[:, :height, :width] = True
        if self.shift_size > 0:
            valid = torch.roll(valid, (-self.shift_size, -self.shift_size), (1, 2))
        return self.window_partition(valid).view(-1, self.window_size**2)


def shift_mask(height, width, size, shift, device):
    """(windows, N, N): -100 between tokens that the roll made neighbours; not to be changed."""
    function = _shift_mask.__wrapped__ if is_recorded(device) else _shift_mask
    return function(height, width, size, shift, device)


@lru_cache(maxsize=8)  # at most 10 MB each, at the first stage of a large image
@torch.inference_mode(False)
def _shift_mask(height, width, size, shift, device):
    parts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    region = torch.zeros((height, width), device=device)
    for number, (rows, columns) in enumerate((r, c) for r in parts for c in parts):
        region[rows, columns] = number
    region = region.view(height // size, size, width // size, size).transpose(1, 2)
    region = region.reshape(-1, size * size)
    apart = region[:, None] != region[:, :, None]
    return torch.zeros_like(apart, dtype=torch.float32).masked_fill_(apart, -100.0)


@CONVERTERS.register(f'{_SWIN}.ShiftWindowMSA')
def convert_shift_window_msa(module, name, quant):
    """Give a ShiftWindowMSA its quantized forward, in place."""
    if CONVERTERS.same_forward(module) and CONVERTERS.same_forward(module.w_msa):
        module.__class__ = QuantShiftWindowMSA
        module.register_buffer('pad_value', torch.zeros(module.w_msa.embed_dims))
    return []


@CONVERTERS.register(f'{_SWIN}.WindowMSA')
def convert_window_msa(module, name, quant):
    """Give a WindowMSA its quantized matmuls, in place; census records of both."""
    if not CONVERTERS.same_forward(module):
        return skipped_matmuls(module, name)
    module.__class__ = QuantWindowMSA
    return quantize_matmuls(module, name, quant)


@POST_NORM.register(f'{_SWIN}.SwinBlock')
def swin_block_pairs(block):
    """(norm, linear, window attention whose padding follows) of a Swin block."""
    pairs = [(block.norm2, block.ffn.layers[0][0], None)]
    if isinstance(block.attn, QuantShiftWindowMSA):
        pairs.insert(0, (block.norm1, block.attn.w_msa.qkv, block.attn))
    return pairs


@POST_NORM.register('mmdet.models.layers.transformer.utils.PatchMerging')
def patch_merging_pairs(merging):
    """(norm, linear, None); merging pads before its norm, so nothing follows."""
    return [] if merging.norm is None else [(merging.norm, merging.reduction, None)]


@VALUE_PROJECTIONS.register(f'{__name__}.QuantWindowMSA')
def window_value_projection(attention):
    """(qkv, proj) of a window attention."""
    return attention.qkv, attention.proj


@QUERY_KEYS.register(f'{__name__}.QuantWindowMSA')
def window_query_keys(attention):
    """(qkv, no tables): positions are added to the product."""
    return attention.qkv, ()


@OUTPUT_NORMS.register(f'{_SWIN}.SwinTransformer')
def swin_output_norms(backbone):
    """The norm of each output map; nothing else reads what it gives."""
    return [getattr(backbone, f'norm{i}') for i in backbone.out_indices]


@CHAINS.register(f'{_SWIN}.SwinTransformer')
def swin_chain(backbone):
    """Leaves: patch embedding; attention and MLP of each block; patch mergings; last norm.

    The side output of a merging (and of the last norm) is the normalised map that
    goes to the neck, as tokens (B, H*W, C).
    """

    def embed(state):
        x, hw = backbone.patch_embed(state.tensors[0])
        if backbone.use_abs_pos_embed:
            x = x + backbone.absolute_pos_embed
        return State((backbone.drop_after_pos(x), ), hw), ()

    leaves = [Leaf('patch_embed', embed, (backbone.patch_embed, ), letter='E')]
    block_number = 0
    for i, stage in enumerate(backbone.stages):
        for j, block in enumerate(stage.blocks):
            name = f'stages.{i}.blocks.{j}'
            place = dict(block=block_number, stage=i)
            leaves += [
                Leaf(f'{name}.attn', _attention(block), (block.norm1, block.attn), **place,
                     letter='A'),
                Leaf(f'{name}.ffn', _mlp(block), (block.norm2, block.ffn), **place, letter='M')
            ]
            block_number += 1
        norm = getattr(backbone, f'norm{i}') if i in backbone.out_indices else None
        if stage.downsample is not None:
            leaves.append(Leaf(
                f'stages.{i}.downsample', _merge(stage.downsample, norm), (stage.downsample, ),
                stage=i, letter='D', sides=norm is not None))
        elif norm is not None:
            leaves.append(Leaf(
                f'norm{i}', _final_norm(norm), stage=i, letter='N', sides=True))
    return Chain('backbone', leaves, channel_axis=-1)


def _attention(block):

    def forward(state):
        x, = state.tensors
        return State((x + block.attn(block.norm1(x), state.meta), ), state.meta), ()

    return forward


def _mlp(block):

    def forward(state):
        x, = state.tensors
        return State((block.ffn(block.norm2(x), identity=x), ), state.meta), ()

    return forward


def _merge(downsample, norm):

    def forward(state):
        x, = state.tensors
        side = () if norm is None else (norm(x), )
        x, hw = downsample(x, state.meta)
        return State((x, ), hw), side

    return forward


def _final_norm(norm):

    def forward(state):
        return State((), state.meta), (norm(state.tensors[0]), )

    return forward
