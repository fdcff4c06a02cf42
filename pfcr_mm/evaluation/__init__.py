"""Metrics."""
from .top_k import TopK

__all__ = ['TopK']
