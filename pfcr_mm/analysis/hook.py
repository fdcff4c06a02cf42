"""The report at the end of a run."""
import logging
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ..engine.fingerprint import fingerprint
from ..models.checkpoint import quantized_state, save_atomically, share_storage
from ..models.manifest import build_manifest
from ..reconstruction import harden
from ..registry import HOOKS

CALIBRATED = 'calibrated.pth'


@HOOKS.register_module()
class DiagnosticsHook(Hook):
    """Writes `report.html` when all else is written, and keeps the calibrated model for it.

    The result of the run is on the disk by then; whatever fails here is one warning line.

    Args:
        enabled (bool): False does nothing.
    """

    priority = 'LOWEST'  # behind ReportHook and, listed after it, UnitCheckpointHook

    def __init__(self, enabled=True):
        self.enabled = enabled

    def calibrated_model(self, runner, model):
        """Save a copy of the only calibrated model (`calibrated.pth`); it is given away."""
        if not self.enabled or not is_main_process():
            return
        try:
            harden(model)
            meta = dict(config=fingerprint(runner.cfg), pfcr_mm=build_manifest(model))
            save_atomically(dict(meta=meta, state_dict=share_storage(quantized_state(model))),
                            Path(runner.work_dir) / CALIBRATED)
        except Exception as error:
            _warn(runner, f'{CALIBRATED} was not written', error)

    def after_quantize(self, runner):
        """Compare the models and write the page."""
        if not self.enabled or not is_main_process():
            return
        try:
            from .report import report_run
            report_run(runner)
        except Exception as error:
            _warn(runner, 'report.html was not written (the result of the run is complete; '
                  'tools/report.py makes the report from it)', error)


def _warn(runner, what, error):
    line = (str(error).strip().splitlines() or ['no message'])[0][:300]
    runner.logger.warning(f'{what}: {type(error).__name__}: {line}')
    if runner.logger.isEnabledFor(logging.DEBUG):
        runner.logger.debug('traceback', exc_info=error)
