"""What lets a quantization loop stop between two units and go on in another process."""
import copy
import hashlib
import json
import platform
import time
import zlib
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from .. import parallel
from ..errors import FaultError, UsageError
from ..models.reparam import fold_alike
from ..models.state import load_model_state, model_state
from ..quantizers import native
from ..reconstruction import UnitRecord
from .resume import (
    RunCheckpoints,
    check_identity,
    identity,
    plain,
    random_state,
    set_random_state,
)
from .shared_calibrations import CODE, SharedCalibrations


class Resumable:
    """Mixin of `PFCRLoop`: a run is a walk over phases and units.

    Between two of them `state_dict` holds all that it has come to, and `load_state_dict`
    goes on from there. Streams are not in it: they are computed again from the model,
    to the same bytes (see `Boundaries`).
    """

    def init_resume(self):
        """A run that has not begun."""
        self.checkpoints = RunCheckpoints(self.runner.work_dir)
        self.finished = []  # phases that are done
        self.position = None  # [POS stage, part, units done in it]
        self.open_phase = None
        self._paths = self._reconstructor = self._state = None
        self._spent, self._began = 0.0, time.time()
        self.checkpoint_seconds = 0.0

    def look_back(self):
        """Before anything is drawn at random: find what an earlier run left, take its seed."""
        self._began = time.time()
        self._done = None
        if not self.runner.wants_resume:
            return
        self._state = parallel.from_main(
            lambda: self.checkpoints.newest(self.runner.logger.warning))
        self._done = parallel.from_main(self.checkpoints.finished) if self._state is None else None
        earlier = self._done if self._state is None else self._state['identity']
        if earlier and self.runner.cfg.get('randomness', {}).get('seed') is None:
            self.runner._seed = int(earlier['seed'])  # MMEngine has drawn a new one

    def begin(self):
        """Go on where an earlier run was, or start with what it left moved aside.

        Returns:
            bool: False where there is nothing to do, the run had finished.
        """
        logger, folder = self.runner.logger, self.runner.work_dir
        self.identity = self._identity()
        if self._state is not None:
            state, self._state = self._state, None
            self.load_state_dict(state)
            logger.info(f'Resumed after {len(self.records)} units')
            return True
        if self._done is not None:
            check_identity(self._done, self.identity, folder)
            report = parallel.from_main(lambda: _report_in(folder))
            self.metrics = {state: report[state] for state in ('float', 'calibrated', 'quantized')
                            if report.get(state)}
            logger.info(f'This run has finished already: see {folder}/report.md')
            return False
        if self.runner.wants_resume:
            logger.info(f'Nothing to resume in {folder}: starting from the beginning')
        aside = parallel.from_main(self.checkpoints.set_aside)
        if aside is not None:
            logger.warning(f'What an earlier run left in {folder} is kept in {aside}')
        return True

    def state_dict(self):
        """All that the run has come to, as plain data; between two units."""
        phases = copy.deepcopy(self.phases)
        if self.open_phase is not None:
            self.open_phase.add_to(phases)
        return dict(
            identity=self.identity, environment=environment(), model=model_state(self.model),
            finished=list(self.finished), position=self.position,
            paths=self._reconstructor.paths() if self._reconstructor else None,
            records=[asdict(record) for record in self.records], notes=list(self.notes),
            folds=list(self.folds), boxes=_pack(self._boxes), metrics=plain(self.metrics),
            all_metrics=plain(self.all_metrics), val_metrics=plain(self.val_metrics),
            phases=plain(phases), seconds=self.elapsed(),
            checkpoint_seconds=self.checkpoint_seconds, random=random_state())

    def load_state_dict(self, state):
        """Go on from a `state_dict` of the same config."""
        check_identity(state['identity'], self.identity, self.checkpoints.folder)
        self._adopt(state)

    def _adopt(self, state):
        load_model_state(self.model, state['model'])
        self.folds, self._boxes = state['folds'], _unpack(state['boxes'])
        for folds in self.folds:  # one by one, as the run made them: for the same bits
            fold_alike(self.teacher, folds)
        self.finished, self.position = state['finished'], state['position']
        self._paths = state['paths']
        self.records = [UnitRecord(**record) for record in state['records']]
        self.notes, self.phases = state['notes'], state['phases']
        self.metrics, self.all_metrics = state['metrics'], state['all_metrics']
        self.val_metrics, self._spent = state['val_metrics'], state['seconds']
        self.checkpoint_seconds = state['checkpoint_seconds']
        set_random_state(state['random'])
        for key, value in environment().items():
            before = state['environment'].get(key)
            same = key == 'processes' and self.images_at_once == 1
            if before != value and not same:
                self.note(f'resumed with {key} {value} after {before}: the result may differ '
                          'from that of a run in one piece, if only in its last bits')

    def take_calibration(self):
        """Go on from where another run was when its calibration was done, if one fits."""
        if self.calibration_dir is None:
            return
        # what was before is each run's own
        self._shareable_from = len(self.notes), self.elapsed()
        shared = self._shared = SharedCalibrations(
            self.calibration_dir, self.identity, environment(), self.runner.cfg)
        state = parallel.from_main(lambda: shared.take(self.runner.logger.warning))
        if state is not None:
            own = list(self.notes)
            self._adopt(state)
            self.notes = own + self.notes
            self.note(f'calibration is that of another run, from {shared.path}; its seconds are '
                      'counted in')

    def leave_calibration(self):
        """Calibration is done: others may begin with it, where `calibration_dir` says so."""
        if self.calibration_dir is None or not parallel.is_main():
            return
        notes, seconds = self._shareable_from
        state = self.state_dict()
        state.update(notes=state['notes'][notes:], seconds=state['seconds'] - seconds,
                     checkpoint_seconds=0.0)
        try:
            self._shared.leave(state)
        except (OSError, FaultError) as error:
            self.runner.logger.warning(
                f'this calibration is not shared, {self._shared.path} cannot be written: {error}')

    def elapsed(self):
        """Seconds of the run so far, its earlier pieces included."""
        return self._spent + time.time() - self._began

    def units_done(self, stage, part):
        """How many units of a stage and part are done, by the position in the whole walk."""
        if self.position is None or self.position[0] < stage.number:
            return 0
        parts = list(self.schedules[stage.number])
        behind = parts.index(self.position[1]) - parts.index(part)
        if behind > 0:
            return len(self.schedules[stage.number][part])
        return self.position[2] if behind == 0 else 0

    def _identity(self):
        images = zlib.crc32(repr(parallel.whole(parallel.Shard(
            (zlib.crc32(inputs.contiguous().numpy()) for inputs, _ in self.images),
            self.images.numbers))).encode())
        weights = hashlib.sha256()
        for name, value in self.teacher.state_dict().items():
            weights.update(name.encode())
            weights.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return identity(
            self.runner.cfg, **{'seed': str(self.seed), 'float checkpoint': weights.hexdigest(),
                                'calibration images': f'{images:08x}'})


def _report_in(folder):
    """`report.json` of the finished run in a work dir."""
    path = Path(folder) / 'report.json'
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f'the run in {folder} has finished, and {path} cannot be read '
            f'({type(error).__name__}); tools/test.py measures the checkpoint beside it again'
        ) from None


def _pack(boxes):
    """Boxes of all images as one tensor a part: many small ones take long to write."""
    return boxes and {part: (torch.cat(found), [len(b) for b in found])
                      for part, found in boxes.items()}


def _unpack(boxes):
    return boxes and {part: list(found.split(counts)) for part, (found, counts) in boxes.items()}


def environment():
    """What a result, or its last bits, depend on beside the config."""
    if torch.cuda.is_available():
        device, kernels = torch.cuda.get_device_name(), 'Triton' if native.on_gpu() else 'PyTorch'
    else:
        device, kernels = _processor(), 'native' if native.library() else 'PyTorch'
    return dict(torch=str(torch.__version__), threads=torch.get_num_threads(), device=device,
                processes=parallel.world_size(), kernels=kernels, code=CODE[:12])


@cache
def _processor():
    """The processor's model, and which of its instructions torch uses."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        model = next(line.partition(':')[2].strip() for line in lines if 'model name' in line)
    except (OSError, StopIteration):  # not Linux, or not x86
        model = platform.processor() or platform.machine()
    return f'{model} ({torch.backends.cpu.get_cpu_capability()})'
