"""Features of boxes, as mmdet's RoI heads cut them from a neck's maps."""
import re

from mmdet.structures.bbox import bbox2roi


def crops(detector, part, maps, boxes):
    """What a RoI head sees: features (n, C, h, w) at boxes, image after image.

    Args:
        detector (nn.Module): the detector.
        part (str): name of the head, such as 'roi_head.bbox_head.1'.
        maps (tuple[Tensor]): of its neck, batch B.
        boxes (list[Tensor]): (n, 4) for each image, in pixels of the network's input.
    """
    extractor = extractor_of(detector, part)
    rois = bbox2roi([found.to(maps[0].device) for found in boxes])
    return extractor(maps[:extractor.num_inputs], rois)


def extractor_of(detector, part):
    """The RoI extractor of a head: 'roi_head.bbox_head.1' has 'bbox_roi_extractor.1'."""
    return detector.get_submodule(re.sub(r'_head(\.\d+)?$', r'_roi_extractor\1', part))
