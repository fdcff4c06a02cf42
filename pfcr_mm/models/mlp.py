"""MLPs: the layers whose input comes from a GELU, and a quantizer made for it."""
from itertools import pairwise

from torch import nn

from ..modules import QuantLayer
from ..quantizers import QuantizerSpec, build_quantizer
from ..registry import POST_GELU


def post_gelu_layers(model):
    """All layers below `model` that alone read the output of a GELU."""
    layers = []
    for module in model.modules():
        find = POST_GELU.find(module)
        if find is not None and POST_GELU.same_forward(module):
            layers += find(module)
    return layers


@POST_GELU.register('mmcv.cnn.bricks.transformer.FFN')
def ffn_layers(ffn):
    """mmcv: each linear but the last one sits beside its activation."""
    found = []
    for part, following in pairwise(ffn.layers):
        if isinstance(part, nn.Sequential) and isinstance(part[1], nn.GELU):
            found.append(following[0] if isinstance(following, nn.Sequential) else following)
    return found


@POST_GELU.register('timm.layers.mlp.Mlp')
def mlp_layers(mlp):
    """timm: fc2, unless a norm lies between."""
    is_plain = isinstance(mlp.act, nn.GELU) and isinstance(mlp.norm, nn.Identity)
    return [mlp.fc2] if is_plain else []


def give_gelu_quantizers(model, post_gelu):
    """Let the layers after a GELU quantize their input as `post_gelu` says, in place.

    Args:
        model (nn.Module): converted, not calibrated.
        post_gelu (dict): `QuantizerSpec` without bits.
    """
    for layer in post_gelu_layers(model):
        if isinstance(layer, QuantLayer):
            bits = layer.input_quantizer.bits
            layer.input_quantizer = build_quantizer(QuantizerSpec(bits=bits, **post_gelu))
