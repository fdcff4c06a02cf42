"""Predictions of the float and the quantized model, image by image."""
import copy
from dataclasses import dataclass

import torch
from mmdet.structures.bbox import bbox_overlaps

from .probe import name_of, on_device

SCORE = 0.3  # detections below are not looked at
IOU = 0.5  # of the same object


@dataclass
class Pair:
    """What both models say of one image."""

    image: str
    path: str
    floating: object  # InstanceData of detections
    quantized: object
    facts: dict


@torch.no_grad()
def predict(model, images):
    """Data samples with predictions in coordinates of the original images."""
    return [model.predict(on_device(model, inputs), copy.deepcopy(samples), rescale=True)[0]
            for inputs, samples in images]


def compare(images, floating, quantized):
    """Predictions of both models, the worst disagreement first.

    Args:
        images (list): (inputs, data samples) pairs.
        floating, quantized (list): from `predict`.

    Returns:
        tuple[list[Pair], dict | None]: of detectors one pair an image; of classifiers an
        empty list and dict(images, same_class): how often both name the same class.
    """
    if not images:
        return [], None
    if not hasattr(floating[0], 'pred_instances'):
        same = [int(a.pred_scores.argmax() == b.pred_scores.argmax())
                for a, b in zip(floating, quantized)]
        return [], dict(images=len(same), same_class=sum(same) / len(same))
    pairs = []
    for (_, samples), ours, theirs in zip(images, floating, quantized):
        a, b = _confident(ours.pred_instances), _confident(theirs.pred_instances)
        pairs.append(Pair(name_of(samples), str(samples[0].metainfo.get('img_path') or ''),
                          a, b, disagreement(a, b)))
    return sorted(pairs, key=lambda pair: -pair.facts['disagreement']), None


def disagreement(floating, quantized):
    """How far two sets of detections of one image are apart.

    Detections of the same class are matched one to one, largest overlap first.

    Args:
        floating, quantized (InstanceData): bboxes (n, 4), labels (n,).

    Returns:
        dict: disagreement, 1 - (sum of the matches' IoU) / (detections of the model that has
        more), 0 to 1; matched, only_float, only_quantized; mean_iou of the matches (None
        without a match).
    """
    overlaps = bbox_overlaps(floating.bboxes.float(), quantized.bboxes.float())
    overlaps = overlaps * (floating.labels[:, None] == quantized.labels[None])
    found = []
    while overlaps.numel() and overlaps.max() >= IOU:
        row, column = divmod(int(overlaps.argmax()), overlaps.shape[1])
        found.append(overlaps[row, column].item())
        overlaps[row], overlaps[:, column] = 0, 0
    most = max(len(floating.labels), len(quantized.labels))
    return dict(
        disagreement=1 - sum(found) / most if most else 0.0, matched=len(found),
        only_float=len(floating.labels) - len(found),
        only_quantized=len(quantized.labels) - len(found),
        mean_iou=sum(found) / len(found) if found else None)


def _confident(instances):
    return instances[instances.scores >= SCORE].to('cpu')
