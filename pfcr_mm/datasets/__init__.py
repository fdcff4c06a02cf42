"""Datasets: generated shapes, which the demo and the tests run on, and folders of images."""
from .image_folder import ImageFolder
from .shapes import CLASSES, draw_image, write_shapes
from .shapes_dataset import ShapesDataset
from .timm_transform import TimmPreprocess

__all__ = [
    'CLASSES', 'ImageFolder', 'ShapesDataset', 'TimmPreprocess', 'draw_image', 'write_shapes'
]
