"""Streams into the parts of a model, neck and heads included."""
from functools import partial

import torch

from .. import parallel
from ..models.chain import State
from ..models.roi_features import crops, extractor_of
from ..models.whole import WHOLE, padded, roi_parts
from . import roi
from .cache import FeatureCache
from .capture import Stream, in_batches, run_over


class PartStreams:
    """What flows into the parts of a model and of its float twin, as they are at the time.

    Parts come in the order in which they are run. All heads read the same maps: when the
    first of them asks, backbone and neck are final, and the streams into all of them are made
    in one run of each model.

    Args:
        models (tuple[nn.Module]): the quantized and the float one.
        images (Images): of calibration.
        parts (list[str]): that will ask, in order.
        boxes (dict[str, list[Tensor]] | None): of the float model for RoI heads, by part and
            number of the image, over all processes; None finds them.
        rois (dict): RoIs an image, `proposals` and `detections`.
        seed (int): draws proposals.
        cache (FeatureCache | None): keeps the streams.
        at_once (int | None): images computed together at most.
    """

    def __init__(self, models, images, parts, boxes, rois, seed, cache=None, at_once=None):
        self.models, self.images, self.boxes = models, images, boxes
        self.rois, self.seed, self.cache, self.at_once = rois, seed, cache, at_once
        self._heads = [part for part in parts if part not in ('backbone', 'neck', WHOLE)]
        self._into = {}

    def into(self, part):
        """(quantized, float) streams into a part; to be asked once."""
        if part == 'backbone':
            return (self.images.stream(), ) * 2
        if part == 'neck':
            return tuple(backbone_stream(m, self.images, self.cache, self.at_once)
                         for m in self.models)
        if part == WHOLE:
            return (self._with_boxes(), ) * 2
        if not self._into:
            self._run()
        return self._into.pop(part)

    def _run(self):
        """Both models up to the maps of their necks: streams into all heads."""
        model, _ = self.models
        floating = self._boxes_of_heads(self._heads)
        quantized, _ = head_streams(
            model, self.images, self._heads, self._known, self.cache, self.at_once)
        self._into = {part: (quantized[part], floating[part]) for part in self._heads}

    def _boxes_of_heads(self, heads):
        """Float streams into heads; boxes are found on the way where they are not known."""
        _, teacher = self.models
        if not self._knows_boxes_of(part for part in heads if part.startswith('roi_head.')):
            self.boxes = None  # an earlier stage had fewer heads, or none
        boxes_of = self._known if self.boxes is not None else partial(
            roi.boxes_of, teacher, seed=self.seed, **self.rois)
        # image by image, so that boxes are the same for any number of processes
        floating, boxes = head_streams(
            teacher, self.images, heads, boxes_of, self.cache, at_once=1)
        if self.boxes is None and boxes:
            self.boxes = {part: parallel.whole(parallel.Shard(found, self.images.numbers))
                          for part, found in boxes.items()}
        return floating

    def _knows_boxes_of(self, heads):
        return set(heads) <= set(self.boxes or ())

    def _known(self, maps, samples, number):
        return {part: found[number] for part, found in self.boxes.items()}

    def _with_boxes(self):
        """Images, each with the boxes that the RoI heads are to see."""
        _, teacher = self.models
        heads = roi_parts(teacher)
        if not self._knows_boxes_of(heads):  # not all of them were reconstructed
            self._boxes_of_heads(heads)
        boxes = ({part: self.boxes[part][number] for part in heads}
                 for number in self.images.numbers)
        return Stream([WithBoxes(state, whole_boxes(own, self.rois))
                       for state, own in zip(self.images.states, boxes)], self.images.numbers)


class WithBoxes:
    """The State of an image, with boxes behind the image.

    Args:
        state (State | Kept): of the image.
        boxes (tuple[Tensor]): see `whole_boxes`.
    """

    def __init__(self, state, boxes):
        self.state, self.boxes = state, boxes
        self.meta, self.rows = state.meta, state.rows
        self.shapes = (*state.shapes, *(b.shape for b in boxes))

    @property
    def tensors(self):
        """tuple[Tensor]: the image and its boxes."""
        return (*self.state.tensors, *self.boxes)

    def ahead(self):
        """It will be looked at soon."""
        self.state.ahead()


def whole_boxes(boxes, rois):
    """Boxes of one image as the chain of the whole detector takes them.

    The last box head sees the detections too, whose masks count by its scores.

    Args:
        boxes (dict[str, Tensor]): (n, 4) by RoI head, box heads first.
        rois (dict): RoIs an image, `proposals` and `detections`.

    Returns:
        tuple[Tensor]: (1, count, 5) by RoI head, see `padded`.
    """
    of_masks = [part for part in boxes if '.mask_head' in part]
    of_boxes = [part for part in boxes if part not in of_masks]
    counts = {**dict.fromkeys(of_boxes, rois['proposals']),
              **dict.fromkeys(of_masks, rois['detections'])}
    found = {part: padded(own, counts[part]) for part, own in boxes.items()}
    if of_masks:
        found[of_boxes[-1]] = torch.cat([found[of_boxes[-1]], found[of_masks[0]]], 1)
    return tuple(found.values())


def backbone_stream(model, images, cache=None, at_once=None):
    """Stream into the neck: the backbone's maps."""

    def run(state):
        return State(tuple(model.backbone(state.tensors[0]))), ()

    return run_over(
        images.stream(), run, [model], 'the backbone', _device_of(model), at_once, cache)[0]


def head_streams(model, images, parts, boxes_of, cache=None, at_once=None):
    """Streams into heads: all maps of the neck, or the features of RoIs.

    Args:
        model (nn.Module): a detector.
        images (Images): of calibration.
        parts (list[str]): names of heads.
        boxes_of (callable): maps, data samples and number of an image -> boxes (n, 4) by RoI
            head; called only where `parts` has one.
        cache, at_once: see `PartStreams`.

    Returns:
        tuple[dict[str, Stream], dict[str, list[Tensor]]]: streams by part, those of RoI heads
        without the images that have no box; and boxes by RoI head, an entry an image.
    """
    cache = cache or FeatureCache()
    rois = [part for part in parts if part.startswith('roi_head.')]
    dense = [part for part in parts if part not in rois]

    def run(batches):
        shelves = {part: cache.shelf() for part in ('maps', *rois)}
        kept, boxes = {part: {} for part in shelves}, [{}] * len(images)
        for index, maps in _maps_by_image(model, batches):
            if dense:
                kept['maps'][index] = shelves['maps'].keep(State(maps))
            if rois:
                boxes[index] = boxes_of(maps, images.samples[index], images.numbers[index])
            for part in rois:
                if len(boxes[index][part]):
                    features = crops(model, part, maps, [boxes[index][part]])
                    kept[part][index] = shelves[part].keep(State((features, )))
        return kept, boxes

    kept, boxes = in_batches(
        images.stream(), run, [model], 'backbone and neck', _device_of(model), at_once)
    streams = {part: Stream([states[i] for i in sorted(states)],
                            [images.numbers[i] for i in sorted(states)])
               for part, states in kept.items()}
    return ({part: streams[part if part in rois else 'maps'] for part in parts},
            {part: [found[part] for found in boxes] for part in rois})


def _maps_by_image(model, batches):
    """Yield (index, maps of batch 1)."""
    for indices, state in batches:
        maps = model.extract_feat(state.tensors[0])
        for k, index in enumerate(indices):
            yield index, tuple(m[k:k + 1] for m in maps)


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
    if part == WHOLE:
        none = dict.fromkeys(roi_parts(model), image.new_zeros(0, 4))
        return State((image, *whole_boxes(none, rois)))
    if not part.startswith('roi_head.'):
        return State(tuple(model.extract_feat(image)))
    extractor = extractor_of(model, part)
    count = rois['proposals' if '.bbox_head' in part else 'detections']
    return State((image.new_zeros(
        count, extractor.out_channels, *extractor.roi_layers[0].output_size), ))


def _device_of(model):
    return next(model.parameters()).device
