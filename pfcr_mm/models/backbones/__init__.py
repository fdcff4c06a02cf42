"""Backbones of our own; mmdet's work as they are."""
from .vit import TimmViT

__all__ = ['TimmViT']
