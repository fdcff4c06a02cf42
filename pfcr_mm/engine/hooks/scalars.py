"""Scalars to MMEngine's visualizer (TensorBoard, W&B, a JSON file, ...), live."""
from mmengine.hooks import Hook

from ...registry import HOOKS


@HOOKS.register_module()
class ScalarsHook(Hook):
    """Adds scalars to the visualizer while reconstructing.

    `quantize/loss` of a unit's optimisation, over the steps of all units; `unit/loss_before`,
    `unit/loss_after`, `unit/accepted` and `unit/seconds`, over the units; `<state>/<metric>`
    of each evaluation. Where they go is what `visualizer.vis_backends` says.

    Args:
        interval (int): steps between two losses.
    """

    def __init__(self, interval=10):
        self.interval = interval

    def before_quantize(self, runner):
        """Go on behind what an earlier piece of the run has told."""
        records = runner.quantize_loop.records
        self.unit, self.steps = len(records), sum(record.iters for record in records)
        self.told = set(runner.quantize_loop.metrics)

    def unit_step(self, runner, step, loss):
        """A point of the loss."""
        if step % self.interval == 0:
            runner.visualizer.add_scalar('quantize/loss', loss.item(), self.steps + step)

    def after_unit(self, runner, record):
        """What came of a unit."""
        self.unit, self.steps = self.unit + 1, self.steps + record.iters
        scalars = dict(loss_before=record.loss_before, loss_after=record.loss_after,
                       accepted=int(record.accepted), seconds=record.seconds)
        for name, value in scalars.items():
            runner.visualizer.add_scalar(f'unit/{name}', value, self.unit)

    def after_phase(self, runner):
        """An evaluation may be done."""
        self._tell(runner)

    def after_quantize(self, runner):
        """The last evaluation is done."""
        self._tell(runner)

    def _tell(self, runner):
        for state, metrics in runner.quantize_loop.metrics.items():
            if state not in self.told:
                self.told.add(state)
                for name, value in metrics.items():
                    runner.visualizer.add_scalar(f'{state}/{name}', value, self.steps)
