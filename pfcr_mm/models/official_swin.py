"""Checkpoints in the naming of Swin-Transformer-Object-Detection, in mmdet's.

The official backbone names its modules otherwise and merges patches in another order
of channels. Neck and heads have mmdet's names already.
"""
import re

_PREFIX = 'backbone.'
# official name -> mmdet's, below 'backbone.'; the first that fits is applied
_NAMES = (
    (r'^layers\.(\d+)\.blocks\.(\d+)\.attn\.', r'stages.\1.blocks.\2.attn.w_msa.'),
    (r'^layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.', r'stages.\1.blocks.\2.ffn.layers.0.0.'),
    (r'^layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.', r'stages.\1.blocks.\2.ffn.layers.1.'),
    (r'^layers\.(\d+)\.', r'stages.\1.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
)
# What the official model computes by itself.
_DERIVED = re.compile(r'.*\.(relative_position_index|attn_mask)$')


def is_official_swin(state):
    """Whether a state dict names its backbone as the official repository does."""
    return any(re.match(r'backbone\.layers\.\d+\.blocks\.\d+\.attn\.qkv\.weight$', key)
               for key in state)


def from_official_swin(state):
    """Rename and reorder, exactly.

    Args:
        state (dict[str, Tensor]): of an official detector.

    Returns:
        dict[str, Tensor]: of mmdet's detector.
    """
    converted = {}
    for key, value in state.items():
        if not key.startswith(_PREFIX):
            converted[key] = value
        elif not _DERIVED.match(key):
            name = key[len(_PREFIX):]
            if '.downsample.' in name:
                value = _merging_order(value)
            converted[_PREFIX + _renamed(name)] = value
    return converted


def _renamed(name):
    for pattern, replacement in _NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _merging_order(value):
    """Reorder the input channels (last axis, 4C) of a patch merging.

    The official module joins four maps, pixel by pixel: rows 0, 1, 0, 1 and columns
    0, 0, 1, 1. mmdet unfolds: each channel with its 2x2 pixels, row by row.
    """
    *rest, channels = value.shape
    value = value.reshape(*rest, 4, channels // 4)[..., [0, 2, 1, 3], :]
    return value.transpose(-1, -2).reshape(*rest, channels)
