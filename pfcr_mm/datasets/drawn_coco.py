"""`DrawnCoco`: a random part of a COCO annotation file, or all the rest of it."""
import json
from pathlib import Path

from mmdet.datasets import CocoDataset

from ..errors import UsageError
from ..files import write_atomically
from ..registry import DATASETS
from .draw import checked_draw, drawn

_MARK = 'drawn_by_pfcr_mm'


@DATASETS.register_module()
class DrawnCoco(CocoDataset):
    """A CocoDataset of some of the images of an annotation file.

    For data too few to have a split of their own for evaluation: one dataset draws the
    images that calibrate, another has `rest=True` and is evaluated on. The part is written
    to `ann_file` on first use, so that a CocoMetric can read it.

    Args:
        source (str): the whole annotation file.
        draw (dict | None): `count` and `seed` of images drawn, and `rest` for all others;
            None takes all.
        ann_file (str): where the part goes; a file of other content is not overwritten.

    Raises:
        UsageError: `source` is missing or no JSON; too few images; `ann_file` is in the way.

    Example:
        >>> dict(type='pfcr_mm.DrawnCoco', source='data/instances_train2017.json',
        ...      ann_file='work_dirs/rest.json', draw=dict(count=96, seed=0, rest=True),
        ...      data_prefix=dict(img='data/train2017/'))
    """

    def __init__(self, source, draw, ann_file, **kwargs):
        write_part(source, checked_draw(draw), ann_file)
        super().__init__(ann_file=ann_file, **kwargs)


def write_part(source, draw, path):
    """Write the part of `source` that `draw` names to `path`, unless it is there.

    Args:
        source (str | Path): annotation file.
        draw (dict | None): from `checked_draw`; None is all images.
        path (str | Path): where to.
    """
    try:
        whole = json.loads(Path(source).read_text())
        images = whole['images']
    except FileNotFoundError:
        raise UsageError(f'annotation file {source} is missing') from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f'annotation file {source} is no COCO annotation file') from None
    mark = dict(draw or {}, source=Path(source).name, images=len(images))
    found = _read_mark(path)
    if found == mark:
        return
    if found is None and Path(path).exists():
        raise UsageError(f'{path} is there and was not drawn from {source}; '
                         'let ann_file name another file')
    kept = images if draw is None else drawn(images, draw, source)
    ids = {image['id'] for image in kept}
    part = dict(
        whole, images=kept, info={_MARK: mark},
        annotations=[a for a in whole['annotations'] if a['image_id'] in ids])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(part))


def _read_mark(path):
    """What a file was drawn from; None where it is missing or something else."""
    try:
        return json.loads(Path(path).read_text())['info'][_MARK]
    except (OSError, ValueError, KeyError, TypeError):
        return None
