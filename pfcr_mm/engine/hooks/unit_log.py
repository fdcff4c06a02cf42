"""Every unit's record, as it comes, in `units.jsonl`."""
import json
from dataclasses import asdict
from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook

from ...files import write_atomically
from ...registry import HOOKS
from .report import finite


@HOOKS.register_module()
class UnitLogHook(Hook):
    """Appends a JSON line a unit to `units.jsonl`, with every `interval`-th loss.

    Args:
        interval (int): steps between two losses that are kept.
    """

    def __init__(self, interval=10):
        self.interval = interval

    @master_only
    def before_quantize(self, runner):
        """Start a new file; of a run that goes on, keep the lines of the units it has."""
        self.path = Path(runner.work_dir) / 'units.jsonl'
        done = len(runner.quantize_loop.records)
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        write_atomically(self.path, ''.join(lines[:done]))

    def before_unit(self, runner, unit):
        """Start a new curve."""
        self.curve = []

    def unit_step(self, runner, step, loss):
        """Keep a point of the curve."""
        if step % self.interval == 0:
            self.curve.append([step, loss.item()])

    @master_only
    def after_unit(self, runner, record):
        """Write the line."""
        with self.path.open('a') as file:
            file.write(json.dumps(finite(dict(asdict(record), curve=self.curve))) + '\n')
