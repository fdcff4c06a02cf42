"""What RoI heads see: boxes, and the features cut from the maps there.

RoI features are cut from the float and from the quantized maps at the *same*
boxes, those of the float model, so that inputs and targets line up.
"""
import re

import torch
from mmdet.models.roi_heads import CascadeRoIHead
from mmdet.structures.bbox import bbox2roi, get_box_tensor

from .. import parallel
from ..models.chain import State
from .cache import FeatureCache
from .capture import Stream
from .noise import seed_of


def float_boxes(teacher, features, samples, proposals_per_image, detections_per_image, seed):
    """Boxes of the float model for every RoI head: those of all processes' images.

    Takes what `own_boxes` takes and gives what it gives, of all images.
    """
    boxes = own_boxes(
        teacher, features, samples, proposals_per_image, detections_per_image, seed)
    return {part: parallel.whole(parallel.Shard(found, features.numbers))
            for part, found in boxes.items()}


@torch.no_grad()
def own_boxes(teacher, features, samples, proposals_per_image, detections_per_image, seed):
    """Boxes of the float model for every RoI head, of the images at hand.

    A box head of a cascade sees the proposals as the float stages before it refined
    them; all mask heads see the float detections.

    Args:
        teacher (nn.Module): the float detector.
        features (Stream): its maps, see `feature_stream`.
        samples (list): data samples of each image.
        proposals_per_image (int): proposals kept: the best half, and a random half.
        detections_per_image (int): detections kept, best first.
        seed (int): draws proposals, with the image's number.

    Returns:
        dict[str, list[Tensor]]: for each part, such as 'roi_head.bbox_head' or
        'roi_head.mask_head.2', one entry an image: boxes (n, 4) in pixels of the network's
        input; n may be 0.
    """
    roi_head, device = teacher.roi_head, device_of(teacher)
    cascade = isinstance(roi_head, CascadeRoIHead)
    stages = range(roi_head.num_stages) if cascade else (None, )
    box_parts, mask_parts = ([f'roi_head.{name}' + ('' if i is None else f'.{i}') for i in stages]
                             for name in ('bbox_head', 'mask_head'))
    boxes = {part: [] for part in box_parts + mask_parts}
    for index, (number, image_samples) in enumerate(zip(features.numbers, samples)):
        generator = torch.Generator().manual_seed(seed_of(seed, number))
        metas = [sample.metainfo for sample in image_samples]
        maps = features.batch([index], device).tensors
        found = teacher.rpn_head.predict(maps, image_samples, rescale=False)
        kept = _some(found[0].bboxes, proposals_per_image, generator)
        entering = refined(roi_head, maps, kept, metas[0]) if cascade else [kept]
        for part, stage_boxes in zip(box_parts, entering):
            boxes[part].append(stage_boxes.cpu())
        # without the masks, which `predict` would paste too
        results = roi_head.predict_bbox(maps, metas, found, roi_head.test_cfg, rescale=False)
        for part in mask_parts:
            boxes[part].append(results[0].bboxes[:detections_per_image].cpu())
    return boxes


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


@torch.no_grad()
def roi_stream(model, part, features, boxes, cache=None):
    """Stream into a RoI head: features (n, C, h, w) of the images that have boxes.

    Args:
        model (nn.Module): the detector.
        part (str): name of the head, such as 'roi_head.bbox_head.1'.
        features (Stream): maps of the same model, see `feature_stream`.
        boxes (list[Tensor]): (n, 4) an image, by its number.
        cache (FeatureCache | None): keeps the features.
    """
    shelf, device = (cache or FeatureCache()).shelf(), device_of(model)
    extractor = extractor_of(model, part)
    states, numbers = [], []
    for index, number in enumerate(features.numbers):
        if len(boxes[number]) == 0:
            continue
        maps = features.batch([index], device).tensors[:extractor.num_inputs]
        states.append(shelf.keep(State((extractor(maps, bbox2roi([boxes[number].to(device)])), ))))
        numbers.append(number)
    return Stream(states, numbers)


def extractor_of(model, part):
    """The RoI extractor of a head: 'roi_head.bbox_head.1' has 'bbox_roi_extractor.1'."""
    return model.get_submodule(re.sub(r'_head(\.\d+)?$', r'_roi_extractor\1', part))


def _some(boxes, count, generator):
    """The best half and a random half of `count` boxes that come best first."""
    half = count // 2
    order = torch.randperm(max(0, len(boxes) - half), generator=generator) + half
    pick = torch.cat([torch.arange(min(half, len(boxes))), order])[:count]
    return boxes[pick.to(boxes.device)]


def device_of(model):
    """Where the parameters of a model lie."""
    return next(model.parameters()).device
