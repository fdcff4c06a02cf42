"""Scale reparameterisation: fold channel-wise post-LayerNorm scales into LN and the next layer.

RepQ-ViT (arXiv 2212.08254), with two repairs: the zero point stays an integer,
and the padding of attention windows moves along. Beyond it, the norms of a backbone's
output maps fold into the 1x1 convolutions of the neck that read them.
"""
from dataclasses import replace

import torch
from torch import nn

from ..modules import QuantConv2d, QuantLinear
from ..quantizers import build_quantizer, search
from ..registry import MAP_READERS, OUTPUT_NORMS, POST_NORM
from .head_folds import fold_heads_alike


def post_norm_pairs(model):
    """All (norm, quantized layer, window attention or None) of a quantized model.

    The layer is the only reader of the norm's output: a linear, or a 1x1 convolution.
    """
    pairs = []
    for module in model.modules():
        find = POST_NORM.find(module)
        if find is not None and POST_NORM.same_forward(module):
            pairs += [pair for pair in find(module) if _can_fold_into(pair[1])]
    return pairs


@POST_NORM.register('mmdet.models.detectors.base.BaseDetector')
def output_map_pairs(detector):
    """(norm, convolution, None) for each map that a norm of the backbone hands to the neck."""
    neck = getattr(detector, 'neck', None)
    norms_of = OUTPUT_NORMS.find(detector.backbone)
    readers_of = MAP_READERS.find(neck) if neck is not None else None
    if norms_of is None or readers_of is None:
        return []
    if not (OUTPUT_NORMS.same_forward(detector.backbone) and MAP_READERS.same_forward(neck)):
        return []
    norms = norms_of(detector.backbone)
    return [(norms[i], layer, None) for i, layer in readers_of(neck).items()
            if isinstance(norms[i], nn.LayerNorm)]


def _can_fold_into(layer):
    if isinstance(layer, QuantConv2d):
        return (layer.kernel_size == (1, 1) and layer.groups == 1
                and layer.padding in ((0, 0), 'valid'))
    return isinstance(layer, QuantLinear)


def make_channelwise(model):
    """Give every layer after a norm a channel-wise input quantizer (not calibrated)."""
    for _, layer, _ in post_norm_pairs(model):
        spec = replace(layer.input_quantizer.spec, granularity='channel')
        layer.input_quantizer = build_quantizer(
            spec, layer.weight.shape[1], layer.input_axis).to(layer.weight)


@torch.no_grad()
def fit_channels(model, seen):
    """Fit channel-wise post-norm quantizers by least squares, each with an offset of its own.

    A channel's grid may lie anywhere: its middle code is given the value 0, and the norm's
    bias moves the channel there. The float function stays, zero points are integers.

    Args:
        model (nn.Module): with calibrated channel-wise quantizers after norms.
        seen (dict): by the name of the layer they reach, inputs (n, channels) and how often each
            counts (n,); None where there are none.

    Returns:
        dict[str, tuple[Tensor, Tensor]]: folds, as `reparameterise` returns them.
    """
    names = {id(module): name for name, module in model.named_modules()}
    moves_padding = getattr(getattr(model, 'quant_config', None), 'move_padding', True)
    folds = {}
    for norm, layer, attention in post_norm_pairs(model):
        quantizer, name = layer.input_quantizer, names[id(layer)]
        if quantizer.spec.granularity != 'channel' or not quantizer.calibrated \
                or quantizer.spec.symmetric or seen.get(name) is None:
            continue
        rows, weights = (value.to(layer.weight) for value in seen[name])
        scale, zero_point = search.fit_affine(
            rows.t(), weights, quantizer.scale, quantizer.zero_point, quantizer.spec)
        middle = torch.full_like(scale, 2**(quantizer.bits - 1))
        folds[name] = torch.ones_like(scale), scale * (middle - zero_point)
        _fold(norm, layer, attention if moves_padding else None, *folds[name])
        quantizer.set_scale(scale, middle)
    return folds


@torch.no_grad()
def reparameterise(model):
    """Turn channel-wise input quantizers into per-tensor ones, exactly.

    With s, z per channel, s~ = mean s, z~ = round(mean z), r = s / s~ and
    b = s~ (z~ - z): LN gives y / r - b, the linear takes W diag(r) and
    bias + W diag(r) b. The float function stays; the per-tensor codes equal the
    channel-wise ones. Weight scales are invalid afterwards and marked so.

    Returns:
        dict[str, tuple[Tensor, Tensor]]: (r, b) by the name of the layer folded into.
    """
    names = {id(module): name for name, module in model.named_modules()}
    moves_padding = getattr(getattr(model, 'quant_config', None), 'move_padding', True)
    folds = {}
    for norm, layer, attention in post_norm_pairs(model):
        quantizer = layer.input_quantizer
        if quantizer.spec.granularity != 'channel' or not quantizer.calibrated:
            continue
        scale, zero_point = quantizer.scale, quantizer.zero_point
        mean_scale, mean_zero = scale.mean(), zero_point.mean()
        if quantizer.spec.integer_zero_point:
            mean_zero = mean_zero.round()
        ratio = scale / mean_scale
        shift = mean_scale * (mean_zero - zero_point)

        _fold(norm, layer, attention if moves_padding else None, ratio, shift)
        folds[names[id(layer)]] = (ratio, shift)
        spec = replace(quantizer.spec, granularity='tensor')
        layer.input_quantizer = build_quantizer(spec).to(layer.weight)
        layer.input_quantizer.set_scale(mean_scale.view(1), mean_zero.view(1))
        layer.input_quantizer.enabled = quantizer.enabled
        layer.weight_quantizer.calibrated = False
    return folds


@torch.no_grad()
def fold_alike(twin, folds):
    """Fold a float twin as `fold_heads` and `reparameterise` folded its model.

    Its function stays; the maps that it hands from part to part then mean the same,
    number by number, as those of the model.

    Args:
        twin (nn.Module): the float model, built alike.
        folds (dict): what they returned.
    """
    names = {id(module): name for name, module in twin.named_modules()}
    fold_heads_alike(twin, folds)  # first, as in the model: for the same bits
    for norm, layer, attention in post_norm_pairs(twin):
        if names[id(layer)] in folds:
            _fold(norm, layer, attention, *folds[names[id(layer)]])


def _fold(norm, layer, attention, ratio, shift):
    ratio, shift = ratio.to(layer.weight), shift.to(layer.weight)
    norm.weight.div_(ratio)
    norm.bias.div_(ratio).sub_(shift)
    layer.weight.mul_(ratio.view(1, -1, *(1, ) * (layer.weight.dim() - 2)))
    layer.bias.add_(layer.weight.flatten(1) @ shift)
    if layer.token_quantizer is not None and layer.token_quantizer.calibrated:
        layer.token_quantizer.fold(ratio, shift)
    if attention is not None:
        attention.pad_value.div_(ratio).sub_(shift)
