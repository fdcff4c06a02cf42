"""A checkpoint of the run after each unit, so that no more than one unit is ever lost."""
import time

from mmengine.dist import master_only
from mmengine.hooks import Hook

from ...registry import HOOKS


@HOOKS.register_module()
class UnitCheckpointHook(Hook):
    """Saves the run after calibration, after each evaluation and after each unit.

    Args:
        interval (float): least seconds between two checkpoints of units; more costs less
            time, and a kill costs up to this much work. A run that is stopped by a
            signal saves what is open in any case.
    """

    priority = 'LOWEST'  # when all others have done their part of a unit

    def __init__(self, interval=0.0):
        self.interval = interval
        self.saved_at, self.open = time.time(), False  # a signal may come before all else

    def before_quantize(self, runner):
        """Start the clock."""
        self.saved_at = time.time()
        self.open = False

    def after_phase(self, runner):
        """Calibration or an evaluation is done."""
        self.save(runner)

    def after_unit(self, runner, record):
        """A unit is done."""
        self.open = True
        if time.time() - self.saved_at >= self.interval:
            self.save(runner)

    def after_stage(self, runner):
        """All units of a stage are done, and the model is about to change."""
        if self.open:
            self.save(runner)

    def on_stop(self, runner):
        """The run ends early, between two units."""
        if self.open:
            self.save(runner)

    @master_only
    def after_quantize(self, runner):
        """All results are written."""
        loop = runner.quantize_loop
        loop.checkpoints.finish(loop.identity)
        runner.logger.info(
            f'Checkpoints took {loop.checkpoint_seconds:.1f} s of {loop.seconds:.1f} s '
            f'({100 * loop.checkpoint_seconds / max(loop.seconds, 1e-9):.1f}%)')

    @master_only
    def save(self, runner):
        """Write a checkpoint, and count what it costs."""
        loop = runner.quantize_loop
        began = time.time()
        loop.checkpoints.save(loop.state_dict())
        self.saved_at, self.open = time.time(), False
        loop.checkpoint_seconds += self.saved_at - began
