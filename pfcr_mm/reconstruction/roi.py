"""Streams into the parts of a detector, neck and heads included.

RoI features are cut from the float and from the quantized maps at the *same*
boxes, those of the float model, so that inputs and targets line up.
"""
import torch
from mmdet.structures.bbox import bbox2roi

from ..models.chain import State
from .capture import Stream


def image_stream(images):
    """Stream into the backbone: (1, 3, H, W) each."""
    return Stream([State((inputs, )) for inputs, _ in images])


@torch.no_grad()
def backbone_stream(model, images, dtype=None):
    """Stream into the neck: the backbone's maps."""
    return Stream([State(tuple(model.backbone(_on(model, x)))) for x, _ in images], dtype)


@torch.no_grad()
def feature_stream(model, images, dtype=None):
    """Stream into the RPN head: all maps of the neck."""
    return Stream([State(tuple(model.extract_feat(_on(model, x)))) for x, _ in images], dtype)


@torch.no_grad()
def float_boxes(teacher, images, proposals_per_image, detections_per_image, generator):
    """Boxes of the float model, one entry an image.

    Args:
        teacher (nn.Module): the float detector.
        images (list): (inputs, data samples) pairs.
        proposals_per_image (int): proposals kept: the best half, and a random half.
        detections_per_image (int): detections kept, best first.

    Returns:
        tuple[list[Tensor], list[Tensor]]: proposals and detected boxes, each (n, 4),
        in pixels of the network's input; n may be 0.
    """
    proposals, detections = [], []
    for inputs, samples in images:
        maps = teacher.extract_feat(_on(teacher, inputs))
        found = teacher.rpn_head.predict(maps, samples, rescale=False)
        boxes = found[0].bboxes
        half = proposals_per_image // 2
        order = torch.randperm(max(0, len(boxes) - half), generator=generator) + half
        pick = torch.cat([torch.arange(min(half, len(boxes))), order])[:proposals_per_image]
        proposals.append(boxes[pick.to(boxes.device)].cpu())
        results = teacher.roi_head.predict(maps, found, samples, rescale=False)
        detections.append(results[0].bboxes[:detections_per_image].cpu())
    return proposals, detections


@torch.no_grad()
def roi_stream(model, extractor, images, boxes, dtype=None):
    """Stream into a RoI head: features (n, C, h, w) of the images that have boxes."""
    states = []
    for (inputs, _), image_boxes in zip(images, boxes):
        if len(image_boxes) == 0:
            continue
        maps = model.extract_feat(_on(model, inputs))
        rois = bbox2roi([image_boxes.to(maps[0].device)])
        states.append(State((extractor(maps[:extractor.num_inputs], rois), )))
    return Stream(states, dtype)


def _on(model, tensor):
    return tensor.to(next(model.parameters()).device)
