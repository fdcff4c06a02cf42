"""`QuantRunner`: MMEngine's Runner, with `quantize()` beside `test()`."""
import inspect
import platform
from contextlib import suppress

import mmdet
import mmengine
import torch
from mmengine.device import get_device
from mmengine.runner import Runner

from .. import parallel
from ..errors import FaultError, UsageError
from ..models.checkpoint import (
    check_float,
    check_quantized,
    load_float,
    load_quantized,
    manifest_of,
    read_checkpoint,
)
from ..registry import LOOPS, RUNNERS
from ..version import __version__
from .lock import WorkDirLock
from .signals import Stopped


@RUNNERS.register_module()
class QuantRunner(Runner):
    """Quantizes a detector, or tests a quantized one.

    Reads three keys beyond the stock ones: `quantize_cfg`, the loop; `quantize_hooks`,
    hooks beside `default_hooks` and `custom_hooks`; and `trust_checkpoint`, which lets
    checkpoints run pickled code (off).

    `quantize()` wants a float checkpoint, `test()` and `val()` a quantized one;
    the other kind ends in one clear error.
    """

    _wants = 'quantized'
    wants_resume = False

    def quantize(self):
        """Load the float weights, quantize, evaluate, save.

        With `resume=True` in the config it goes on where an unfinished run in the same
        work dir was; without, what that one left is moved aside.

        Returns:
            dict: metrics of the float, the calibrated and the quantized model.

        Raises:
            UsageError: a mistake in the config, or another run is at work in the work dir.
            Stopped: SIGINT or SIGTERM came; the units that were done are saved.
        """
        self.wants_resume, self._resume = self._resume, False  # the loop does it, not MMEngine
        self.want_float()
        loop = self.build_quantize_loop()
        with WorkDirLock(self.work_dir), loop.stop:
            self.call_hook('before_run')
            self.load_or_resume()
            try:
                report = loop.run()
            except (Stopped, FaultError):
                with suppress(FaultError):  # the disk may be what is full
                    self.call_hook('on_stop')
                raise
            self.call_hook('after_run')
        return report

    def want_float(self):
        """Take float weights from now on; raises UsageError where no checkpoint is named."""
        if self._load_from is None:
            raise UsageError(
                'no float checkpoint: give CHECKPOINT on the command line, or load_from')
        self._wants = 'float'

    def build_quantize_loop(self):
        """Build `quantize_loop` from the config's `quantize_cfg` and return it."""
        if 'quantize_cfg' not in self.cfg:
            raise UsageError(
                "the config has no quantize_cfg; inherit 'pfcr_mm::_base_/pfcr.py'")
        loop = LOOPS.get(self.cfg.quantize_cfg.get('type', 'pfcr_mm.PFCRLoop'))
        known = inspect.signature(loop).parameters if loop is not None else ()
        for key in self.cfg.quantize_cfg if known else ():
            if key not in ('type', '_scope_') and key not in known:  # MMEngine adds scopes
                raise UsageError(
                    f'quantize_cfg.{key} is not a known key; choose of '
                    f"{[name for name in known if name != 'runner']}")
        key = 'quantize_cfg'
        try:
            self.quantize_loop = LOOPS.build(
                self.cfg.quantize_cfg, default_args=dict(runner=self))
            key = 'quantize_hooks'
            for hook in self.cfg.get('quantize_hooks', ()):
                self.register_hook(hook)
        except (TypeError, AttributeError, ValueError) as error:  # no dict, no list, ...
            if isinstance(error, UsageError):
                raise
            raise UsageError(f'{key} is not right: {error}') from error
        return self.quantize_loop

    def test(self):
        """The stock test; without a checkpoint there is nothing to test."""
        if self._load_from is None and not self._has_loaded:
            raise UsageError('no quantized checkpoint: give its path')
        return super().test()

    def load_checkpoint(self, filename, map_location='cpu', strict=False, revise_keys=None):
        """Load safely, and the kind of weights that is wanted, or raise UsageError."""
        check = check_float if self._wants == 'float' else check_quantized
        checkpoint = read_checkpoint(
            filename, bool(self.cfg.get('trust_checkpoint', False)),
            lambda found: check(self.model, found, filename))
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        load = load_float if self._wants == 'float' else load_quantized
        load(self.model, checkpoint, filename)
        self._has_loaded = True
        kind = 'float' if manifest_of(checkpoint) is None else 'quantized'
        self.logger.info(f'Loaded {kind} weights from {filename}')
        return checkpoint

    def setup_env(self, env_cfg):
        """Stock set-up in a group of ours; masked attention gives denormal numbers, which
        slow a CPU down, and a GPU is to compute convolutions as it does products, in float32."""
        parallel.start(self._launcher, type(self).__name__)
        super().setup_env(env_cfg)
        torch.set_flush_denormal(True)
        torch.backends.cudnn.allow_tf32 = False

    def wrap_model(self, model_wrapper_cfg, model):
        """Move to the device; reconstruction needs no wrapper around the model."""
        return model.to(get_device())

    def build_evaluator(self, evaluator):
        """The stock evaluator; processes collect results through their group, where MMEngine's
        default is files in the current folder, which machines may not share."""
        evaluator = super().build_evaluator(evaluator)
        if parallel.world_size() > 1:
            for metric in evaluator.metrics:
                metric.collect_device = 'gpu'  # MMEngine's word; gloo takes it on a CPU
        return evaluator

    def build_visualizer(self, visualizer=None):
        """The stock one, by a name of its own: MMEngine keeps visualizers by name, and a second
        run in a process would write into the first one's folder."""
        if isinstance(visualizer, dict):
            visualizer = dict(visualizer, name=self.log_dir)
        return super().build_visualizer(visualizer)

    def get_hooks_info(self):
        """The hooks in one line; the stock table fills screens."""
        return 'Hooks: ' + ', '.join(type(hook).__name__ for hook in self._hooks)

    def _log_env(self, env_cfg):
        # The stock report fills screens; the whole config is dumped to the work dir.
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
        self.logger.info(
            f'pfcr_mm {__version__}, mmdet {mmdet.__version__}, mmengine {mmengine.__version__}, '
            f'torch {torch.__version__}, Python {platform.python_version()}; '
            f'{device}, {torch.get_num_threads()} threads, {parallel.world_size()} processes, '
            f'seed {self._seed}')
