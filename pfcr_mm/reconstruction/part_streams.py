"""Streams into the parts of a model, neck and heads included."""
import torch

from ..models.chain import State
from . import roi
from .capture import run_over


class PartStreams:
    """What flows into the parts of a model and of its float twin, as they are at the time.

    Parts come in the order in which they are run. All heads read the same maps, which are
    computed once: when the first of them asks, behind a backbone and a neck that are final.

    Args:
        models (tuple[nn.Module]): the quantized and the float one.
        images (Images): of calibration.
        cache (FeatureCache | None): keeps the streams.
        at_once (int | None): images computed together at most.
    """

    def __init__(self, models, images, cache=None, at_once=None):
        self.models, self.images = models, images
        self.cache, self.at_once = cache, at_once
        self._features = None

    def into(self, part, boxes=None):
        """(quantized, float) streams into a part.

        Args:
            part (str): its name.
            boxes (Callable | None): float features -> boxes by part, see `roi.float_boxes`;
                for RoI heads.
        """
        if part == 'backbone':
            return (self.images.stream(), ) * 2
        if part == 'neck':
            return [backbone_stream(m, self.images, self.cache, self.at_once)
                    for m in self.models]
        if self._features is None:
            self._features = [feature_stream(m, self.images, self.cache, self.at_once)
                              for m in self.models]
        if not part.startswith('roi_head.'):  # RPN and dense heads
            return self._features
        found = boxes(self._features[1])[part]
        return [roi.roi_stream(m, part, features, found, self.cache)
                for m, features in zip(self.models, self._features)]


def backbone_stream(model, images, cache=None, at_once=None):
    """Stream into the neck: the backbone's maps."""
    return _map_stream(model, images, model.backbone, 'backbone', cache, at_once)


def feature_stream(model, images, cache=None, at_once=None):
    """Stream into the RPN or a dense head: all maps of the neck."""
    return _map_stream(model, images, model.extract_feat, 'backbone and neck', cache, at_once)


def _map_stream(model, images, maps_of, where, cache, at_once):

    def run(state):
        return State(tuple(maps_of(state.tensors[0]))), ()

    return run_over(
        images.stream(), run, [model], where, roi.device_of(model), at_once, cache)[0]


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
    extractor = roi.extractor_of(model, part)
    count = rois['proposals' if '.bbox_head' in part else 'detections']
    return State((image.new_zeros(
        count, extractor.out_channels, *extractor.roi_layers[0].output_size), ))
