"""What RoI heads see: boxes, and the features cut from the maps there.

RoI features are cut from the float and from the quantized maps at the *same*
boxes, those of the float model, so that inputs and targets line up.
"""
import torch
from mmdet.models.roi_heads import CascadeRoIHead
from mmdet.structures.bbox import bbox2roi, get_box_tensor

from .noise import seed_of


@torch.no_grad()
def boxes_of(teacher, maps, samples, number, proposals, detections, seed):
    """Boxes of the float model on one image, for every RoI head.

    A box head of a cascade sees the proposals as the float stages before it refined
    them; all mask heads see the float detections.

    Args:
        teacher (nn.Module): the float detector.
        maps (tuple[Tensor]): of its neck, batch 1.
        samples (list): the image's data sample.
        number (int): of the image; draws proposals, with the seed.
        proposals (int): kept: the best half, and a random half.
        detections (int): kept, best first.
        seed (int): see `number`.

    Returns:
        dict[str, Tensor]: for each part, such as 'roi_head.bbox_head' or
        'roi_head.mask_head.2': boxes (n, 4) in pixels of the network's input, on the CPU;
        n may be 0.
    """
    roi_head = teacher.roi_head
    cascade = isinstance(roi_head, CascadeRoIHead)
    stages = range(roi_head.num_stages) if cascade else (None, )
    box_parts, mask_parts = ([f'roi_head.{name}' + ('' if i is None else f'.{i}') for i in stages]
                             for name in ('bbox_head', 'mask_head'))
    metas = [sample.metainfo for sample in samples]
    found = teacher.rpn_head.predict(maps, samples, rescale=False)
    generator = torch.Generator().manual_seed(seed_of(seed, number))
    kept = _some(found[0].bboxes, proposals, generator)
    entering = refined(roi_head, maps, kept, metas[0]) if cascade else [kept]
    # without the masks, which `predict` would paste too
    results = roi_head.predict_bbox(maps, metas, found, roi_head.test_cfg, rescale=False)
    detected = results[0].bboxes[:detections].cpu()
    return {**{part: boxes.cpu() for part, boxes in zip(box_parts, entering)},
            **dict.fromkeys(mask_parts, detected)}


def refined(roi_head, maps, boxes, meta):
    """What enters each box stage of a cascade: the boxes, refined by the stages before.

    Args:
        roi_head (CascadeRoIHead): of one image's detector.
        maps (tuple[Tensor]): of one image.
        boxes (Tensor): (n, 4).
        meta (dict): the image's metainfo.

    Returns:
        list[Tensor]: (n, 4) for every stage.
    """
    entering = [boxes]
    for stage in range(roi_head.num_stages - 1):
        boxes, head = entering[-1], roi_head.bbox_head[stage]
        if len(boxes) > 0 and head.with_reg:
            found = roi_head._bbox_forward(stage, maps, bbox2roi([boxes]))
            scores = found['cls_score']
            if head.custom_activation:
                scores = head.loss_cls.get_activation(scores)
            boxes = get_box_tensor(head.regress_by_class(
                boxes, scores[:, :-1].argmax(1), found['bbox_pred'], meta))
        entering.append(boxes)
    return entering


def _some(boxes, count, generator):
    """The best half and a random half of `count` boxes that come best first."""
    half = count // 2
    order = torch.randperm(max(0, len(boxes) - half), generator=generator) + half
    pick = torch.cat([torch.arange(min(half, len(boxes))), order])[:count]
    return boxes[pick.to(boxes.device)]
