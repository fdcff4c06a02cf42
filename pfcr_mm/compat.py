"""The one place for work-arounds of the stack below us."""
import importlib.util
import sys

import torch

# Kept for the life of the process: the schemas vanish with the Library object.
_TORCHVISION_SCHEMAS = None


def ensure_torchvision():
    """Make `import torchvision` work with a CPU torch and a CUDA torchvision.

    PyPI's Linux wheels of torchvision are CUDA builds. On a CPU torch their C++
    operators do not load, and the import dies at "operator torchvision::nms does
    not exist". timm and MMEngine's environment report import torchvision but use
    none of these operators, so declaring their schemas is enough. Nothing is done
    where torchvision is absent or its real operators are there.
    """
    global _TORCHVISION_SCHEMAS
    if 'torchvision' in sys.modules or importlib.util.find_spec('torchvision') is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if 'torchvision::nms does not exist' not in str(error):
            raise
        for name in [n for n in sys.modules if n.split('.')[0] == 'torchvision']:
            del sys.modules[name]
        _TORCHVISION_SCHEMAS = torch.library.Library('torchvision', 'FRAGMENT')
        for op in ('nms', 'qnms'):
            _TORCHVISION_SCHEMAS.define(
                f'{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        import torchvision  # noqa: F401
