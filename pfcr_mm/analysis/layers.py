"""Every layer: bits, scales, what rounding did to its weight, its local error."""
import torch

from ..models.manifest import layer_entries
from ..modules import QuantLayer
from .noise import plain_db, sqnr_db


@torch.no_grad()
def layers(model, twin, local):
    """One entry a layer of the census.

    Args:
        model (nn.Module): quantized and hardened.
        twin (nn.Module): float, folded alike.
        local (dict[str, Noise]): by layer, from `Taps`: output of the quantized layer
            against that of the float layer for the same input.

    Returns:
        list[dict]: see `layer_entries`, and sqnr_db (None where no data came by), and for
        layers with a weight: see `weight_facts`.
    """
    own, twins = dict(model.named_modules()), dict(twin.named_modules())
    found = []
    for record in layer_entries(model):
        entry = dict(record, sqnr_db=None)
        noise = local.get(record['name'])
        if noise is not None and noise.signal + noise.noise > 0:
            entry['sqnr_db'] = noise.db
        layer = own.get(record['name'])
        if isinstance(layer, QuantLayer) and layer.weight_quantizer.calibrated:
            entry.update(weight_facts(layer, twins[record['name']].weight))
        found.append(entry)
    return found


@torch.no_grad()
def weight_facts(layer, weight):
    """What became of a weight.

    Args:
        layer (QuantLayer): quantized.
        weight (Tensor): the float weight, folded alike.

    Returns:
        dict: flipped (share of weights that are not the level nearest to their float
        value), moved (share that are two levels or more away), weight_sqnr_db,
        scale_min, scale_max (over output channels), scale_spread (their ratio),
        levels_used (share of levels that some weight is on, over all channels).
    """
    quantizer = layer.weight_quantizer
    codes = quantizer.encode(layer.quantized_weight())
    apart = (codes - quantizer.encode(weight)).abs()
    final = quantizer.decode(codes)
    scale = quantizer.scale
    low, high = quantizer.code_range
    rows = quantizer.by_scale(codes)
    used = sum((rows == code).any(1).double().mean().item() for code in range(low, high + 1))
    return dict(
        flipped=(apart >= 1).double().mean().item(), moved=(apart >= 2).double().mean().item(),
        weight_sqnr_db=plain_db(sqnr_db(
            weight.double().square().sum().item(),
            (final - weight).double().square().sum().item())),
        scale_min=scale.min().item(), scale_max=scale.max().item(),
        scale_spread=(scale.max() / scale.min()).item(), levels_used=used / (high - low + 1))
