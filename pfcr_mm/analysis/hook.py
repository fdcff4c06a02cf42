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
from .checks import Limits

CALIBRATED = 'calibrated.pth'
_KEY = 'DiagnosticsHook of quantize_hooks: checks'


@HOOKS.register_module()
class DiagnosticsHook(Hook):
    """Writes `report.html` when all else is written, and keeps the calibrated model for it.

    The result of the run is on the disk by then; whatever fails here is one warning line.

    Args:
        enabled (bool): False does nothing.
        checks (dict | None): from where on a check warns, see `Limits`.
    """

    priority = 'VERY_LOW'  # behind ReportHook; a run has finished when its page is there too

    def __init__(self, enabled=True, checks=None):
        self.enabled = enabled
        self.limits = Limits.build(checks, _KEY)

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
            report_run(runner, self.limits)
        except Exception as error:
            _warn(runner, 'report.html was not written (the result of the run is complete; '
                  'tools/report.py makes the report from it)', error)


def limits_of(cfg):
    """The limits that a config gives to its DiagnosticsHook; the defaults where it has none."""
    for hook in cfg.get('quantize_hooks') or ():
        if isinstance(hook, dict) and str(hook.get('type')).endswith('DiagnosticsHook'):
            return Limits.build(hook.get('checks'), _KEY)
    return Limits()


def _warn(runner, what, error):
    line = (str(error).strip().splitlines() or ['no message'])[0][:300]
    runner.logger.warning(f'{what}: {type(error).__name__}: {line}')
    if runner.logger.isEnabledFor(logging.DEBUG):
        runner.logger.debug('traceback', exc_info=error)
