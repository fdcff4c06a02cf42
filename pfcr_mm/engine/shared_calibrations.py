"""Calibrations that several runs share: methods are compared from the same start, paid once."""
import hashlib
import json
import re
from functools import cache
from pathlib import Path

from ..errors import UsageError
from .resume import read_run, write_run

# What only reconstruction, or a measurement behind calibration, reads.
_RECONSTRUCTS = re.compile(
    r'quantize_cfg\.(levels|head_levels|traversal|pos|reconstruction|head_reconstruction|rois|'
    r'total_iters|expected|evaluate\.calibrated)(\.|$)')
_PACKAGE = Path(__file__).parents[1]


class SharedCalibrations:
    """A folder of runs' states as they are when calibration is done, one file for each.

    A state fits a run whose `identity` is the same in all that calibration depends on (model,
    weights, images, seed, `quantize_cfg.calibration`, what the float model is measured with),
    on a machine and with code that give the same bits.

    Args:
        folder (str | Path): made where it is missing.
        identity (dict[str, str]): of the run, see `resume.identity`.
        environment (dict): see `resumable.environment`.

    Raises:
        UsageError: the folder cannot be made.
    """

    def __init__(self, folder, identity, environment):
        self.identity = {k: v for k, v in identity.items() if not _RECONSTRUCTS.match(k)}
        key = json.dumps([self.identity, environment, _code()], sort_keys=True)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"quantize_cfg.calibration_dir='{folder}' cannot be written to: "
                             f'{error.strerror}') from None
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


@cache
def _code():
    """Hash of this package's sources: another version may calibrate otherwise."""
    found = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob('*.py')):
        found.update(path.read_bytes())
    return found.hexdigest()
