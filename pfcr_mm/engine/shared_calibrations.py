"""Calibrations that several runs share: methods are compared from the same start, paid once."""
import hashlib
import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import UsageError
from .resume import read_run, write_run

# What only reconstruction, or a measurement behind calibration, reads.
_RECONSTRUCTS = re.compile(
    r'quantize_cfg\.(levels|head_levels|traversal|pos|reconstruction|head_reconstruction|rois|'
    r'total_iters|expected|evaluate\.calibrated)(\.|$)')
_PACKAGE = Path(__file__).parents[1]
# Packages whose versions may change bits or metrics; torch's is in the environment.
_PACKAGES = ('mmengine', 'mmcv', 'mmdet', 'timm', 'numpy', 'pycocotools', 'torchvision', 'pillow',
             'opencv-python', 'opencv-python-headless')


class SharedCalibrations:
    """A folder of runs' states as they are when calibration is done, one file for each.

    A state fits a run whose `identity` is the same in all that calibration depends on (model,
    weights, images, seed, `quantize_cfg.calibration`, what the float model is measured with),
    on a machine and with code that give the same bits: this package, modules of
    `custom_imports`, installed packages. Images and annotations that the float model is
    measured on are known by their config alone; who replaces those files takes another folder.

    Args:
        folder (str | Path): that is there.
        identity (dict[str, str]): of the run, see `resume.identity`.
        environment (dict): see `resumable.environment`.
        cfg (Config): of the runner.
    """

    def __init__(self, folder, identity, environment, cfg):
        self.identity = {k: v for k, v in identity.items() if not _RECONSTRUCTS.match(k)}
        key = json.dumps([self.identity, environment, _versions(), _imported(cfg)], sort_keys=True)
        self.path = Path(folder) / f'{hashlib.sha256(key.encode()).hexdigest()[:16]}.pth'

    def take(self, warn):
        """The state that fits, or None.

        Args:
            warn (callable): called with a line where there is one, and it is damaged.
        """
        if not self.path.is_file():
            return None
        try:
            return read_run(self.path)
        except UsageError as error:
            warn(f'{error}; calibrating anew')
            return None

    def leave(self, state):
        """Write a state for others; the file is whole at any moment."""
        write_run(self.path, state)


def _hash_of(*paths):
    """Of the contents of files, and of all code in folders, compiled code included."""
    found = hashlib.sha256()
    for root in paths:
        code = (path for path in root.rglob('*') if path.suffix in ('.py', '.so', '.pyd'))
        for path in sorted(code) if root.is_dir() else [root]:
            found.update(f'{path.relative_to(root)} {path.stat().st_size} '.encode())
            found.update(path.read_bytes())
    return found.hexdigest()


# Taken as it is imported: sources may be edited while a run goes on.
CODE = _hash_of(_PACKAGE)


def _versions():
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _imported(cfg):
    """Hash of the modules that the config imports, and what it hooks into the runner."""
    names = (cfg.get('custom_imports') or {}).get('imports') or []
    names = [names] if isinstance(names, str) else names
    files = [getattr(sys.modules.get(name), '__file__', None) for name in names]
    return [_hash_of(*(Path(f) for f in files if f)),
            repr([cfg.get(key) for key in ('custom_hooks', 'env_cfg', 'default_scope')])]
