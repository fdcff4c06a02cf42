"""Streams into the parts of a detector, neck and heads included.

RoI features are cut from the float and from the quantized maps at the *same*
boxes, those of the float model, so that inputs and targets line up.
"""
import re

import torch
from mmdet.models.roi_heads import CascadeRoIHead
from mmdet.structures.bbox import bbox2roi, get_box_tensor

from .. import parallel
from ..models.chain import State
from ..modules import weights_once
from .cache import FeatureCache
from .capture import Stream
from .noise import seed_of


@torch.no_grad()
def backbone_stream(model, images, cache=None):
    """Stream into the neck: the backbone's maps."""
    return _map_stream(model, images, model.backbone, cache)


@torch.no_grad()
def feature_stream(model, images, cache=None):
    """Stream into the RPN head: all maps of the neck."""
    return _map_stream(model, images, model.extract_feat, cache)


def _map_stream(model, images, maps_of, cache):
    shelf = (cache or FeatureCache()).shelf()
    with weights_once([model]):
        states = [shelf.keep(State(tuple(maps_of(_on(model, inputs))))) for inputs, _ in images]
    return Stream(states, parallel.numbers_of(images))


def float_boxes(teacher, images, proposals_per_image, detections_per_image, seed):
    """Boxes of the float model for every RoI head: those of all processes' images.

    Takes what `own_boxes` takes and gives what it gives, of all images.
    """
    boxes = own_boxes(teacher, images, proposals_per_image, detections_per_image, seed)
    return {part: parallel.whole(parallel.Shard(found, parallel.numbers_of(images)))
            for part, found in boxes.items()}


@torch.no_grad()
def own_boxes(teacher, images, proposals_per_image, detections_per_image, seed):
    """Boxes of the float model for every RoI head, of the images at hand.

    A box head of a cascade sees the proposals as the float stages before it refined
    them; all mask heads see the float detections.

    Args:
        teacher (nn.Module): the float detector.
        images (list | Images): (inputs, data samples) pairs.
        proposals_per_image (int): proposals kept: the best half, and a random half.
        detections_per_image (int): detections kept, best first.
        seed (int): draws proposals, with the image's number.

    Returns:
        dict[str, list[Tensor]]: for each part, such as 'roi_head.bbox_head' or
        'roi_head.mask_head.2', one entry an image: boxes (n, 4) in pixels of the network's
        input; n may be 0.
    """
    cascade = isinstance(teacher.roi_head, CascadeRoIHead)
    stages = range(teacher.roi_head.num_stages) if cascade else (None, )
    box_parts, mask_parts = ([f'roi_head.{name}' + ('' if i is None else f'.{i}') for i in stages]
                             for name in ('bbox_head', 'mask_head'))
    boxes = {part: [] for part in box_parts + mask_parts}
    for number, (inputs, samples) in zip(parallel.numbers_of(images), images):
        generator = torch.Generator().manual_seed(seed_of(seed, number))
        maps = teacher.extract_feat(_on(teacher, inputs))
        found = teacher.rpn_head.predict(maps, samples, rescale=False)
        kept = _some(found[0].bboxes, proposals_per_image, generator)
        entering = refined(teacher.roi_head, maps, kept, samples[0].metainfo) if cascade else [kept]
        for part, stage_boxes in zip(box_parts, entering):
            boxes[part].append(stage_boxes.cpu())
        results = teacher.roi_head.predict(maps, found, samples, rescale=False)
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
def roi_stream(model, part, images, boxes, cache=None):
    """Stream into a RoI head: features (n, C, h, w) of the images that have boxes.

    Args:
        model (nn.Module): the detector.
        part (str): name of the head, such as 'roi_head.bbox_head.1'.
        images (list | Images): (inputs, data samples) pairs.
        boxes (list[Tensor]): (n, 4) an image, by its number.
        cache (FeatureCache | None): keeps the features.
    """
    shelf = (cache or FeatureCache()).shelf()
    extractor = extractor_of(model, part)
    states, numbers = [], []
    with weights_once([model]):
        for number, (inputs, _) in zip(parallel.numbers_of(images), images):
            image_boxes = boxes[number]
            if len(image_boxes) == 0:
                continue
            numbers.append(number)
            maps = model.extract_feat(_on(model, inputs))
            rois = bbox2roi([image_boxes.to(maps[0].device)])
            states.append(shelf.keep(State((extractor(maps[:extractor.num_inputs], rois), ))))
    return Stream(states, numbers)


@torch.no_grad()
def sample_state(model, part, image, rois):
    """What flows into a part for one image: the shapes are right, RoI features are zero.

    Args:
        model (nn.Module): the detector.
        part (str): name of the part.
        image (Tensor): (1, 3, H, W).
        rois (dict): RoIs an image, `proposals` and `detections`.
    """
    if part == 'backbone':
        return State((image, ))
    if part == 'neck':
        return State(tuple(model.backbone(image)))
    if not part.startswith('roi_head.'):
        return State(tuple(model.extract_feat(image)))
    extractor = extractor_of(model, part)
    count = rois['proposals' if '.bbox_head' in part else 'detections']
    return State((image.new_zeros(
        count, extractor.out_channels, *extractor.roi_layers[0].output_size), ))


def extractor_of(model, part):
    """The RoI extractor of a head: 'roi_head.bbox_head.1' has 'bbox_roi_extractor.1'."""
    return model.get_submodule(re.sub(r'_head(\.\d+)?$', r'_roi_extractor\1', part))


def _some(boxes, count, generator):
    """The best half and a random half of `count` boxes that come best first."""
    half = count // 2
    order = torch.randperm(max(0, len(boxes) - half), generator=generator) + half
    pick = torch.cat([torch.arange(min(half, len(boxes))), order])[:count]
    return boxes[pick.to(boxes.device)]


def _on(model, tensor):
    return tensor.to(next(model.parameters()).device)
