"""Scale reparameterisation: fold channel-wise post-LayerNorm scales into LN and the next layer.

RepQ-ViT (arXiv 2212.08254), with two repairs: the zero point stays an integer,
and the padding of attention windows moves along.
"""
from dataclasses import replace

import torch

from ..modules import QuantLinear
from ..quantizers import build_quantizer
from ..registry import POST_NORM


def post_norm_pairs(model):
    """All (norm, QuantLinear, window attention or None) of a quantized model."""
    pairs = []
    for module in model.modules():
        find = POST_NORM.find(module)
        if find is not None:
            pairs += [pair for pair in find(module) if isinstance(pair[1], QuantLinear)]
    return pairs


def make_channelwise(model):
    """Give every layer after a norm a channel-wise input quantizer (not calibrated)."""
    for _, layer, _ in post_norm_pairs(model):
        spec = replace(layer.input_quantizer.spec, granularity='channel')
        layer.input_quantizer = build_quantizer(spec, layer.in_features, -1).to(layer.weight)


@torch.no_grad()
def reparameterise(model):
    """Turn channel-wise input quantizers into per-tensor ones, exactly.

    With s, z per channel, s~ = mean s, z~ = round(mean z), r = s / s~ and
    b = s~ (z~ - z): LN gives y / r - b, the linear takes W diag(r) and
    bias + W diag(r) b. The float function stays; the per-tensor codes equal the
    channel-wise ones. Weight scales are invalid afterwards and marked so.

    Returns:
        int: how many pairs were folded.
    """
    folded = 0
    for norm, layer, attention in post_norm_pairs(model):
        quantizer = layer.input_quantizer
        if quantizer.spec.granularity != 'channel' or not quantizer.calibrated:
            continue
        scale, zero_point = quantizer.scale, quantizer.zero_point
        mean_scale, mean_zero = scale.mean(), zero_point.mean().round()
        ratio = scale / mean_scale
        shift = mean_scale * (mean_zero - zero_point)

        norm.weight.div_(ratio)
        norm.bias.div_(ratio).sub_(shift)
        layer.weight.mul_(ratio)
        layer.bias.add_(layer.weight @ shift)
        if attention is not None:
            attention.pad_value.div_(ratio).sub_(shift)

        spec = replace(quantizer.spec, granularity='tensor')
        layer.input_quantizer = build_quantizer(spec).to(layer.weight)
        layer.input_quantizer.set_scale(mean_scale.view(1), mean_zero.view(1))
        layer.input_quantizer.enabled = quantizer.enabled
        layer.weight_quantizer.calibrated = False
        folded += 1
    return folded
