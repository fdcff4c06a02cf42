"""`ShapesDataset`: the generated data set as an mmdet CocoDataset."""
from mmdet.datasets import CocoDataset

from ..registry import DATASETS
from .shapes import CLASSES, write_shapes


@DATASETS.register_module()
class ShapesDataset(CocoDataset):
    """A CocoDataset of generated shapes, drawn on first use.

    Args:
        data_root (str): folder of the data set; drawn into where missing.
        split (str): 'train' or 'val' (any name: each has its own images).
        num_images (int): images in the split.
        seed (int): seed of the drawing.
        image_size (int): height and width in pixels.
        scene (str): 'normal' or 'hard', see `SCENES`.
    """

    METAINFO = dict(
        classes=CLASSES,
        palette=[(220, 20, 60), (0, 114, 178), (0, 158, 115), (230, 159, 0), (204, 121, 167),
                 (86, 180, 233)])

    def __init__(self, data_root, split, num_images, seed=0, image_size=128, scene='normal',
                 **kwargs):
        write_shapes(data_root, split, num_images, seed, image_size, scene)
        super().__init__(
            data_root=data_root,
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=f'{split}/'),
            **kwargs)
