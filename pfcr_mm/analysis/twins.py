"""The models that a report compares: the quantized one, the calibrated one, their float twin."""
import copy

import torch
from mmengine.device import get_device

from ..models.checkpoint import load_float, load_quantized, manifest_of, read_checkpoint
from ..models.head_folds import free_heads
from ..models.reparam import fold_alike, post_norm_pairs
from ..modules import set_quantization
from ..registry import MODELS

_RATIOS = (1e-4, 1e4)  # a fold stretches a channel by less


def load_twin(cfg, path, check=None):
    """Build the detector of a config and load float or quantized weights, safely.

    Args:
        cfg (Config): with `model`, of type 'pfcr_mm.QuantDetector'.
        path (str | Path): checkpoint.
        check (callable | None): gets the checkpoint's `meta` before anything is loaded.

    Returns:
        nn.Module: in eval mode, without gradients; quantizers are on where the checkpoint
        is quantized.

    Raises:
        UsageError: it is missing, damaged or of another model.
    """
    checkpoint = read_checkpoint(str(path), bool(cfg.get('trust_checkpoint', False)))
    if check is not None:
        check(checkpoint.get('meta') or {})
    model = MODELS.build(copy.deepcopy(cfg.model))
    model.eval()
    model.requires_grad_(False)
    load = load_float if manifest_of(checkpoint) is None else load_quantized
    load(model, checkpoint, str(path))
    return model.to(get_device())


@torch.no_grad()
def align(floating, quantized):
    """Fold the float twin as the quantized model is folded; what it computes stays.

    Reparameterisation has moved scales from the norms of the quantized model into the
    layers behind them. Its activations can be compared number by number only with those
    of a twin that is folded alike. The fold is read off the norms of both, that of heads
    off the buffers that hold it.

    Args:
        floating (nn.Module): the float twin, changed in place.
        quantized (nn.Module): built alike.
    """
    names = {id(module): name for name, module in floating.named_modules()}
    folds = {}
    for (norm, layer, _), (other, *_) in zip(post_norm_pairs(floating), post_norm_pairs(quantized)):
        ratio = _sane(norm.weight / other.weight)
        folds[names[id(layer)]] = ratio, norm.bias / ratio - other.bias
    others = free_heads(quantized)
    for name, free in free_heads(floating).items():
        own, other = free.folded, others[name].folded
        if any(not torch.equal(own[key], other[key]) for key in own):  # not folded already
            folds[name] = other
    fold_alike(floating, folds)
    set_quantization(floating, False, False)


def _sane(ratio):
    """Ratios of a fold; one where something else made them, NaN included."""
    sane = (ratio > _RATIOS[0]) & (ratio < _RATIOS[1])
    return torch.where(sane, ratio, torch.ones_like(ratio))
