"""pfcr_mm: low-bit post-training quantization for transformer detectors, on MMDetection."""
from mmengine.config.utils import MODULE2PACKAGE

from .compat import ensure_torchvision
from .version import __version__

# `_base_ = 'pfcr_mm::...'` in a config resolves to this package.
MODULE2PACKAGE.setdefault('pfcr_mm', 'pfcr_mm')
ensure_torchvision()

__all__ = ['__version__']
