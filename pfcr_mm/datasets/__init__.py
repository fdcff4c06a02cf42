"""Datasets: generated shapes, folders of images, drawn parts of a COCO file."""
from .drawn_coco import DrawnCoco
from .image_folder import ImageFolder
from .shapes import CLASSES, draw_image, write_shapes
from .shapes_dataset import ShapesDataset
from .timm_transform import TimmPreprocess

__all__ = [
    'CLASSES', 'DrawnCoco', 'ImageFolder', 'ShapesDataset', 'TimmPreprocess', 'draw_image',
    'write_shapes'
]
