"""The chain of a whole two-stage detector: an image and boxes in, predictions out."""
from torch.nn import functional as F

from ..errors import UsageError
from .chain import Chain, Leaf, State
from .detector import parts
from .roi_features import crops

WHOLE = 'detector'  # name of the chain, and of the level of its only unit

# kinds of predictions, see `whole_chain`
DENSE_SCORES, DENSE_DELTAS, PRESENT, SCORES, DELTAS, MASKS = KINDS = (
    'dense_scores', 'dense_deltas', 'present', 'scores', 'deltas', 'masks')


def whole_chain(detector, chains):
    """One leaf with all parts of a detector that has an RPN and RoI heads.

    Input: the image (B, 3, H, W), then for each RoI head boxes (B, n, 5) as `padded` makes them.
    Output, its kinds in `Chain.kinds`: the RPN's `dense_scores` (B, A, h, w) of every level, its
    `dense_deltas` (B, 4A, h, w) of every level; for each box head `present` (B, n), `scores`
    (B, n, classes + 1) and `deltas` (B, n, 4 classes, or 4); for each mask head `present` and
    `masks` (B, n, classes or 1, h, w). All are what the head gives, before any sigmoid or softmax.

    Args:
        detector (nn.Module): see `QuantDetector`.
        chains (dict[str, Chain]): of its parts.

    Raises:
        UsageError: a detector of another kind.
    """
    reason = _why_not(detector, chains)
    if reason is not None:
        raise UsageError(f'quantize_cfg.head_levels: {WHOLE!r} is for detectors with an RPN and '
                         f'RoI heads that are reconstructed; {reason}')
    rois = roi_parts(detector)

    def forward(state):
        image, *boxes = state.tensors
        maps = detector.extract_feat(image)
        outputs = chains['rpn_head'].run(State(tuple(maps)))[0].tensors
        maps = tuple(m.float() for m in maps)  # under autocast boxes would be rounded too
        for part, found in zip(rois, boxes):
            features = crops(detector, part, maps, list(found[..., :4]))
            own = chains[part].run(State((features, )))[0].tensors
            outputs += (found[..., 4], *(x.unflatten(0, found.shape[:2]) for x in own))
        return State(outputs), ()

    levels = len(detector.rpn_head.prior_generator.strides)
    kinds = (DENSE_SCORES, ) * levels + (DENSE_DELTAS, ) * levels
    for part in rois:
        kinds += (PRESENT, MASKS) if '.mask_head' in part else (PRESENT, SCORES, DELTAS)
    modules = [getattr(detector, name) for name in ('backbone', 'neck', 'rpn_head', 'roi_head')
               if getattr(detector, name, None) is not None]
    return Chain(WHOLE, [Leaf(WHOLE, forward, tuple(modules))], channel_axis=1, kinds=kinds)


def roi_parts(detector):
    """Names of the RoI heads, box heads first."""
    return [name for name, _ in parts(detector) if name.startswith('roi_head.')]


def padded(boxes, count):
    """Boxes (n, 4) as (1, count, 5): the last column is 1, and 0 where there is no box."""
    return F.pad(F.pad(boxes, (0, 1), value=1.0), (0, 0, 0, count - len(boxes)))[None]


def _why_not(detector, chains):
    """Why there is no chain of the whole, or None."""
    found = [name for name, _ in parts(detector)]
    if 'rpn_head' not in found or not any('.bbox_head' in name for name in found):
        return f'this {type(detector).__name__} has the parts {found}'
    for name in ('rpn_head', *roi_parts(detector)):
        if name not in chains:
            return f'its {name} is not'
    if not detector.rpn_head.use_sigmoid_cls:
        return 'its RPN has a softmax'
    for name in roi_parts(detector):
        head = detector.get_submodule(name)
        if '.bbox_head' in name and not (head.with_cls and head.with_reg):
            return f'its {name} does not classify and regress'
        if '.bbox_head' in name and (
                head.custom_activation or getattr(head.loss_cls, 'use_sigmoid', False)):
            return f'the scores of its {name} are no softmax'
    return None
