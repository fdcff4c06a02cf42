"""Datasets: the generated `ShapesDataset`, which the demo and the tests run on."""
from .shapes import CLASSES, draw_image, write_shapes
from .shapes_dataset import ShapesDataset

__all__ = ['CLASSES', 'ShapesDataset', 'draw_image', 'write_shapes']
