"""Fold batch norms into the convolutions before them, exactly.

A folded detector has its final form from the build on: convolutions with a bias, an
identity in place of each norm. A float checkpoint still holds the norms; its state is
folded on the way in. A quantized checkpoint is in folded form already.
"""
from collections import Counter
from dataclasses import dataclass

import torch
from mmcv.cnn import ConvModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# What a batch norm leaves in a state dict.
_NORM_KEYS = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


@dataclass(frozen=True)
class Folded:
    """A batch norm that has gone into a convolution.

    Args:
        conv, norm (str): their full names.
        eps (float): the norm's.
    """

    conv: str
    norm: str
    eps: float


def fold_batch_norms(model):
    """Take the batch norm out of every ConvModule that computes act(norm(conv(x))).

    The convolution gets a bias, the norm becomes an identity. Weights and statistics
    at hand are folded; those of checkpoints are by `fold_state`. A convolution or norm
    with several users (heads that share convolutions over levels) stays as it is.

    Args:
        model (nn.Module): float, in the form that the config builds.

    Returns:
        list[Folded]: what was folded.
    """
    blocks = {}  # a block may have several names
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ConvModule):
            blocks.setdefault(module, []).append(name)
    users = Counter(id(child) for block in blocks for child in block.children())
    folded = []
    for block, names in blocks.items():
        if not _foldable(block) or users[id(block.conv)] > 1 or users[id(block.norm)] > 1:
            continue
        norm = block.norm
        state = {f'conv.{key}': value for key, value in block.conv.state_dict().items()}
        state.update({f'norm.{key}': value for key, value in norm.state_dict().items()})
        fold_state(state, [Folded('conv', 'norm', norm.eps)])
        block.conv.weight.data.copy_(state['conv.weight'])
        block.conv.bias = nn.Parameter(state['conv.bias'])
        setattr(block, block.norm_name, nn.Identity())
        folded += [Folded(f'{name}.conv', f'{name}.{block.norm_name}', norm.eps) for name in names]
    return folded


def fold_state(state, folded, prefix=''):
    """Fold the norms that a float state dict holds, in place.

    W' = W g / sqrt(v + eps) and b' = (b - m) g / sqrt(v + eps) + beta per output
    channel, in float64. Entries without running statistics are folded already and stay.

    Args:
        state (dict[str, Tensor]): changed.
        folded (list[Folded]): from `fold_batch_norms`.
        prefix (str): what the names in `state` start with.
    """
    for fold in folded:
        conv, norm = f'{prefix}{fold.conv}.', f'{prefix}{fold.norm}.'
        mean, variance = (state.get(f'{norm}{key}') for key in ('running_mean', 'running_var'))
        weight = state.get(f'{conv}weight')
        if mean is None or variance is None or weight is None or len(mean) != len(weight):
            continue
        gain, shift = (state.get(f'{norm}{key}') for key in ('weight', 'bias'))
        factor = torch.rsqrt(variance.double() + fold.eps)
        if gain is not None:
            factor = factor * gain.double()
        bias = state.get(f'{conv}bias', torch.zeros_like(mean)).double()
        bias = (bias - mean.double()) * factor
        if shift is not None:
            bias = bias + shift.double()
        factor = factor.view(-1, *(1, ) * (weight.dim() - 1))
        state[f'{conv}weight'] = (weight.double() * factor).to(weight.dtype)
        state[f'{conv}bias'] = bias.to(weight.dtype)
        for key in _NORM_KEYS:
            state.pop(f'{norm}{key}', None)


def _foldable(block):
    """Whether the block is a plain convolution with a batch norm right behind it."""
    norm = block.norm if block.with_norm else None
    return (isinstance(norm, _BatchNorm) and norm.track_running_stats
            and block.order.index('norm') == block.order.index('conv') + 1
            and isinstance(block.conv, nn.Conv2d) and not block.with_spectral_norm
            and block.efficient_conv_bn_eval_forward is None)
