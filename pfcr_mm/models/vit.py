"""Plain ViTs on timm: quantized attention, chains, post-norm pairs.

One code path for the detection backbone (maps of tokens, windows) and for timm's own
classifiers (sequences with class and register tokens): the blocks are the same.
"""
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import nn

from ..registry import CHAINS, CONVERTERS, POST_NORM, QUERY_KEYS, VALUE_PROJECTIONS
from .backbones.attention import GridAttention, MatmulAttention
from .chain import Chain, Leaf, State
from .convert import LayerRecord, quantize_matmuls, skipped_matmuls

_VIT = 'timm.models.vision_transformer'


@CONVERTERS.register('timm.layers.attention.Attention')
def convert_attention(attention, name, quant):
    """Give an attention its quantized matmuls, in place; census records of its products."""
    if not isinstance(attention, MatmulAttention):
        if type(attention).forward is not Attention.forward:
            return skipped_matmuls(attention, name)
        MatmulAttention.adopt(attention)
    records = quantize_matmuls(attention, name, quant)
    if isinstance(attention, GridAttention):
        if attention.window_size:  # from now on it may move: a checkpoint has to hold it
            attention.register_buffer('pad_value', attention.pad_value)
        if attention.rel_pos_h is not None:
            records.append(LayerRecord(
                f'{name}.rel_pos', 'Matmul', skipped_reason='relative positions stay float'))
    return records


@POST_NORM.register(f'{_VIT}.Block')
def block_pairs(block):
    """(norm, linear, window attention whose padding follows) of a block.

    A norm whose output goes anywhere else than into that linear is left alone.
    """
    pairs = []
    attention = block.attn
    if _foldable(block.norm1) and isinstance(attention, MatmulAttention) \
            and attention.gate is None:
        windowed = getattr(attention, 'window_size', 0) > 0
        pairs.append((block.norm1, attention.qkv, attention if windowed else None))
    if _foldable(block.norm2) and type(block.mlp) is Mlp:
        pairs.append((block.norm2, block.mlp.fc1, None))
    return pairs


_ATTENTIONS = [f'{cls.__module__}.{cls.__qualname__}' for cls in (MatmulAttention, GridAttention)]


@VALUE_PROJECTIONS.register(*_ATTENTIONS)
def value_projection(attention):
    """(qkv, proj) of an attention, or None where a gate or a norm lies before `proj`."""
    plain = attention.gate is None and isinstance(attention.norm, nn.Identity)
    return (attention.qkv, attention.proj) if plain else None


@QUERY_KEYS.register(*_ATTENTIONS)
def query_keys(attention):
    """(qkv, tables that queries meet besides keys), or None where norms lie between."""
    if not all(isinstance(norm, nn.Identity) for norm in (attention.q_norm, attention.k_norm)):
        return None
    tables = (getattr(attention, name, None) for name in ('rel_pos_h', 'rel_pos_w'))
    return attention.qkv, tuple(table for table in tables if table is not None)


def _foldable(norm):
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


@CHAINS.register('pfcr_mm.models.backbones.vit.TimmViT')
def vit_chain(backbone):
    """Leaves: patches with positions; attention and MLP of each block; the last map.

    State: a map of tokens (B, H, W, C). Side outputs: the maps for the neck, likewise.
    Where global blocks lie among windowed ones, each closes a group of blocks.
    """

    def embed(state):
        return State((backbone.embed(state.tensors[0]), )), ()

    def last(state):
        return State(()), (backbone.norm(state.tensors[0]), )

    owned = (backbone.patch_embed, backbone.norm_pre)
    leaves = [Leaf('patch_embed', embed, owned, letter='E')]
    leaves += _block_leaves(backbone.blocks, _groups(backbone))
    for i in backbone.out_indices[:-1]:
        mlp = leaves[2 * i + 2]
        mlp.forward, mlp.sides = _with_side(mlp.forward, backbone.norm), True
    leaves.append(Leaf('norm', last, (backbone.norm, ), letter='N', sides=True))
    return Chain('backbone', leaves, channel_axis=-1)


@CHAINS.register(f'{_VIT}.VisionTransformer')
def classifier_chain(vit):
    """Leaves of a timm classifier: embedding; attention and MLP of each block; the head.

    State: tokens (B, N, C) with class and register tokens, at last the logits (B, classes).
    """
    if not all(type(block).forward is Block.forward for block in vit.blocks):
        return None

    def embed(state):
        tokens = vit._pos_embed(vit.patch_embed(state.tensors[0]))
        return State((vit.norm_pre(vit.patch_drop(tokens)), )), ()

    def classify(state):
        return State((vit.forward_head(vit.norm(state.tensors[0])), )), ()

    leaves = [Leaf('patch_embed', embed, (vit.patch_embed, vit.norm_pre), letter='E')]
    leaves += _block_leaves(vit.blocks, [None] * len(vit.blocks))
    heads = [getattr(vit, name, None)
             for name in ('norm', 'attn_pool', 'fc_norm', 'head', 'head_dist')]
    leaves.append(Leaf('head', classify, tuple(head for head in heads if head is not None)))
    distilled = getattr(vit, 'head_dist', None) is not None
    prefix = 1 + distilled if vit.global_pool == 'token' and vit.cls_token is not None else 0
    return Chain('backbone', leaves, channel_axis=-1, gives='logits', prefix_tokens=prefix)


def _groups(backbone):
    """Number of the group of each block: windowed blocks up to and with a global one."""
    depth = len(backbone.blocks)
    if not backbone.window_size or not 0 < len(backbone.global_blocks) < depth:
        return [None] * depth
    return [sum(g < i for g in backbone.global_blocks) for i in range(depth)]


def _block_leaves(blocks, groups):
    leaves = []
    for i, (block, group) in enumerate(zip(blocks, groups)):
        place = dict(block=i, group=group)
        leaves += [
            Leaf(f'blocks.{i}.attn', _attention(block), (block.norm1, block.attn, block.ls1),
                 **place, letter='A'),
            Leaf(f'blocks.{i}.mlp', _mlp(block), (block.norm2, block.mlp, block.ls2), **place,
                 letter='M')
        ]
    return leaves


def _attention(block):

    def forward(state):
        x, = state.tensors
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        return State((x, ), state.meta), ()

    return forward


def _mlp(block):

    def forward(state):
        x, = state.tensors
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return State((x, ), state.meta), ()

    return forward


def _with_side(forward, norm):

    def with_side(state):
        state, side = forward(state)
        return state, side + (norm(state.tensors[0]), )

    return with_side
