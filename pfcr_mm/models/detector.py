"""`QuantDetector`: build an mmdet detector with quantized layers; name its parts."""
import logging

from mmdet.models.roi_heads import BaseRoIExtractor, CascadeRoIHead, StandardRoIHead
from mmengine.logging import print_log
from torch import nn

from ..registry import CHAINS, MODELS
from .class_tokens import give_token_quantizers
from .convert import QuantConfig, convert
from .fold import fold_batch_norms, fold_state
from .reparam import post_norm_pairs


@MODELS.register_module()
def QuantDetector(arch, quant, **cfg):  # noqa: N802  named as configs spell it
    """Build the mmdet detector `arch` and swap its layers, in place.

    The result *is* that detector: `init_detector`, `DetInferencer` and a stock
    Runner take it as any other. Quantizers start off, so with a float checkpoint
    it computes exactly what the float detector computes.

    Args:
        arch (str): type of the detector, such as 'MaskRCNN'.
        quant (dict): see `QuantConfig`.
        **cfg: everything else of the detector's config.

    Returns:
        nn.Module: the detector, with `quant_config`, `census` and `folded` (batch norms
        that have gone into convolutions).
    """
    config = QuantConfig.from_dict(quant)
    detector = MODELS.build(dict(type=arch, _scope_='mmdet', **cfg))
    detector.folded = fold_batch_norms(detector)
    detector.census = convert(detector, config)
    detector.quant_config = config
    add_missing_biases(detector)
    if config.class_tokens == 'own':
        give_token_quantizers(part_chains(detector)[0])
    detector.wants_float = False  # set while tools/quant.py loads what it is to quantize
    detector._register_load_state_dict_pre_hook(_warn_of_float, with_module=True)
    detector._register_load_state_dict_pre_hook(_fold_norms, with_module=True)
    for extractor in detector.modules():
        if isinstance(extractor, BaseRoIExtractor):
            extractor.register_forward_pre_hook(_warn_of_layout)
    return detector


def _warn_of_float(detector, state_dict, prefix, *_):
    """Say so where float weights arrive: quantizers without scales stay off."""
    if not detector.wants_float and not any('_quantizer.log_scale' in key for key in state_dict):
        print_log(
            'float weights in a quantized detector: it runs in float; load a checkpoint that '
            'tools/quant.py wrote', 'current', logging.WARNING)


def _warn_of_layout(extractor, args):
    """Say so, once, where RoI features are not those of the map."""
    if not getattr(extractor, 'told', False) and not all(m.is_contiguous() for m in args[0]):
        extractor.told = True
        print_log(
            "maps with channels last in memory reach mmcv's RoIAlign, which misreads them: RoI "
            'heads see something else, in training too; let the neck return contiguous maps',
            'current', logging.WARNING)


def _fold_norms(detector, state_dict, prefix, *_):
    """Whoever loads a float checkpoint: its batch norms go where the detector's went."""
    fold_state(state_dict, detector.folded, prefix)


def parts(detector):
    """Yield (name, module) of the parts that PFCR treats one by one, in order.

    A cascade's heads are parts each: roi_head.bbox_head.0, roi_head.bbox_head.1, ...
    """
    yield 'backbone', detector.backbone
    if getattr(detector, 'with_neck', False):
        yield 'neck', detector.neck
    for name in ('rpn_head', 'bbox_head', 'mask_head'):
        if getattr(detector, name, None) is not None:
            yield name, getattr(detector, name)
    roi_head = getattr(detector, 'roi_head', None)
    if roi_head is not None:
        for name in ('bbox_head', 'mask_head'):
            if not getattr(roi_head, f'with_{name.split("_")[0]}', False):
                continue
            head = getattr(roi_head, name)
            if isinstance(head, nn.ModuleList):
                yield from ((f'roi_head.{name}.{i}', stage) for i, stage in enumerate(head))
            else:
                yield f'roi_head.{name}', head


def part_chains(detector):
    """The chains of a detector, and the parts that have none.

    Returns:
        tuple[dict[str, Chain], dict[str, str]]: chains by part name; for the other
        parts the reason.
    """
    chains, without = {}, {}
    for name, module in parts(detector):
        build = CHAINS.find(module)
        kind = type(module).__name__
        if build is None:
            without[name] = f'no chain is registered for {kind}'
            continue
        if not CHAINS.same_forward(module):
            without[name] = f'{kind} has a forward of its own'
            continue
        reason = _no_rois(detector) if name.startswith('roi_head.') else None
        if reason is not None:
            without[name] = reason
            continue
        chain = build(module)
        if chain is None:
            without[name] = f'this {kind} has layers that its chain does not know'
            continue
        chain.name = name
        chains[name] = chain
    return chains, without


def _no_rois(detector):
    """Why RoI features cannot be cut the plain way, or None."""
    if not detector.with_rpn or detector.roi_head.with_shared_head:
        return 'RoI features need an RPN and no shared head'
    kind = type(detector.roi_head)
    for method in ('_bbox_forward', '_mask_forward'):
        if getattr(kind, method, None) not in [
                getattr(plain, method) for plain in (StandardRoIHead, CascadeRoIHead)]:
            return f'{kind.__name__} has a {method} of its own'
    return None


def add_missing_biases(detector):
    """Give layers that follow a folded norm a bias (zero), so shapes are final at build.

    The names of the biases made are kept in `created_biases`: a float checkpoint
    does not have these.
    """
    names = {id(module): name for name, module in detector.named_modules()}
    detector.created_biases = set()
    for _, layer, _ in post_norm_pairs(detector):
        if layer.bias is None:
            detector.created_biases.add(f'{names[id(layer)]}.bias')
            layer.register_parameter('bias', type(layer.weight)(layer.weight.new_zeros(
                layer.weight.shape[0])))
