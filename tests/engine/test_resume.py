"""A run that ends early goes on where it was, with the same result; nothing is lost."""
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout

import demo_runs
import pytest
import torch
from demo_runs import W4A4, arguments, load_tool
from mmengine.hooks import Hook
from mmengine.logging import MMLogger

from pfcr_mm.cli import quant_main
from pfcr_mm.datasets import ShapesDataset
from pfcr_mm.engine.hooks.unit_checkpoint import UnitCheckpointHook
from pfcr_mm.engine.lock import WorkDirLock
from pfcr_mm.engine.resume import RunCheckpoints, read_run
from pfcr_mm.engine.signals import Stopped, StopSignals
from pfcr_mm.errors import FaultError, UsageError
from pfcr_mm.registry import DATASETS, HOOKS

kill_test = load_tool('dev/kill_test')


class Killed(BaseException):
    """Stands for the end of the process."""


@HOOKS.register_module(force=True)
class DieHook(Hook):
    """Ends the run at the next moment of `moments`: (name of a hook stage, how often seen)."""

    priority = 'LOWEST'
    moments, action = [], Killed
    seen = 0

    def __init__(self):
        type(self).seen = 0

    def _see(self, stage):
        if self.moments and self.moments[0][0] == stage:
            type(self).seen += 1
            if self.seen == self.moments[0][1]:
                self.moments.pop(0)
                type(self).action()

    def after_phase(self, runner):
        self._see('after_phase')

    def before_unit(self, runner, unit):
        self._see('before_unit')

    def unit_step(self, runner, step, loss):
        self._see('unit_step')

    def after_unit(self, runner, record):
        self._see('after_unit')

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._see('after_test_iter')


def raise_killed():
    raise Killed


@pytest.fixture()
def die():
    """die(moments, action): end the next runs there."""

    def plan(moments, action=raise_killed):
        DieHook.moments, DieHook.action = list(moments), staticmethod(action)

    yield plan
    plan([])


@pytest.fixture(autouse=True)
def _fresh_logger():
    MMLogger._instance_dict.clear()


@pytest.fixture(autouse=True, scope='module')
def _no_formatter():
    """MMEngine formats the config three times a run, which takes longer than a unit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
        yield


# A run of one part, nothing measured before the end.
BRIEF = ['quantize_cfg.parts=[neck]', 'quantize_cfg.evaluate.float=False',
         'quantize_cfg.evaluate.calibrated=False']
BACKBONE = ['quantize_cfg.parts=[backbone]', *BRIEF[1:]]


@pytest.fixture(scope='module')
def quick(tmp_path_factory, tiny_run):
    """Arguments of a quick run whose every phase is short, without flags and work dir."""
    folder = tmp_path_factory.mktemp('quick')
    # The data of `tiny_run`, so that images are drawn once.
    options = [*tiny_run.options, 'quantize_cfg.levels=[block,backbone]',
               'quantize_cfg.pos.stage1_levels=[block]', 'quantize_cfg.head_levels=[chain]',
               'quantize_cfg.reconstruction.iters=2', 'quantize_cfg.calibration.method=minmax',
               'quantize_cfg.calibration.images=8', 'quantize_cfg.calibration.held_out=2',
               'quantize_cfg.calibration.search_images=2', 'quantize_hooks.6.enabled=False']
    config = folder / W4A4.name
    config.write_text(f"_base_ = '{W4A4}'\n"
                      "quantize_hooks = [*_base_.quantize_hooks, dict(type='pfcr_mm.DieHook')]\n")

    def build(work_dir, *flags, extra=()):
        return [*arguments(config, tiny_run.checkpoint, work_dir, (*options, *extra)), *flags]

    return build


@pytest.fixture(scope='module')
def whole(quick, tmp_path_factory):
    """The work dir of a quick run in one piece."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    assert quant_main(quick(folder)) == 0
    return folder


def run_pieces(args, ways):
    """Run until there is no more `Killed`; returns the number of pieces."""
    pieces = 0
    while True:
        pieces += 1
        MMLogger._instance_dict.clear()
        try:
            assert quant_main([*args, '--resume']) == 0
            return pieces
        except Killed:
            assert pieces <= len(ways)


# --- the same result --------------------------------------------------------

def test_killed_everywhere(quick, whole, die, tmp_path):
    """In each phase, before, in and after units, twice in the same unit, while evaluating."""
    ways = [('after_phase', 1), ('after_phase', 1), ('before_unit', 1), ('unit_step', 2),
            ('unit_step', 4), ('after_unit', 1), ('after_unit', 3), ('before_unit', 1),
            ('before_unit', 5), ('after_unit', 2), ('unit_step', 1), ('after_test_iter', 2)]
    die(ways)
    assert run_pieces(quick(tmp_path / 'run'), ways) == len(ways) + 1
    assert kill_test.differences(whole, tmp_path / 'run') == []
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    assert report['seconds'] > max(
        phase['seconds'] for phase in report['phases'].values())
    assert sum(p['seconds'] for p in report['phases'].values()) < report['seconds']


def check_pieces(quick, die, folder, ways, extra):
    """A run that ends in `ways`, and goes on each time, gives what one in one piece does."""
    assert quant_main(quick(folder / 'whole', extra=extra)) == 0
    die(ways)
    assert run_pieces(quick(folder / 'run', extra=extra), ways) == len(ways) + 1
    assert kill_test.differences(folder / 'whole', folder / 'run') == []


def test_killed_with_other_options(quick, die, tmp_path):
    extra = [*BACKBONE, 'model.quant.rounding=adaround', 'quantize_cfg.cache_dtype=float16',
             'quantize_cfg.calibration.fit_norms=True',
             'quantize_cfg.traversal=level_order', 'quantize_cfg.pos.mode=unit',
             'quantize_cfg.reconstruction.keep_prob=0.5']
    check_pieces(quick, die, tmp_path, [
        ('after_unit', 2), ('unit_step', 1), ('after_unit', 3), ('after_unit', 4)], extra)


def test_killed_between_the_units_of_heads(quick, die, tmp_path):
    """Streams into heads are made for all of them at once: here again, for those that are left."""
    extra = ['quantize_cfg.parts=[*head*]', *BRIEF[1:], 'quantize_cfg.head_levels=[leaf]',
             'quantize_cfg.cache_dtype=float16']
    check_pieces(quick, die, tmp_path, [
        ('after_unit', 1), ('after_unit', 2), ('unit_step', 1), ('after_unit', 3)], extra)
    parts = {u['chain'] for u in kill_test.read_units(tmp_path / 'run' / 'units.jsonl')}
    assert parts == {'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head'}


@pytest.mark.parametrize('parts', ['roi_head.*,detector', 'detector'])
def test_killed_before_and_in_the_whole_detector(quick, die, tmp_path, parts):
    """Its boxes are those of the heads, or found where no head is reconstructed."""
    extra = [f'quantize_cfg.parts=[{parts}]', *BRIEF[1:],
             'quantize_cfg.head_levels=[chain,detector]', 'quantize_cfg.cache_dtype=float16']
    units = 3 if 'roi' in parts else 1
    check_pieces(quick, die, tmp_path, [('before_unit', units), ('unit_step', 1)], extra)
    found = kill_test.read_units(tmp_path / 'run' / 'units.jsonl')
    assert [u['level'] for u in found] == ['chain'] * (units - 1) + ['detector']
    assert found[-1]['name'] == found[-1]['chain'] == 'detector' and found[-1]['iters'] == 1


def test_killed_while_the_page_is_made(quick, monkeypatch, tmp_path):
    """A run has finished when report.html is there; until then --resume makes it."""
    extra = [*BRIEF, 'quantize_hooks.6.enabled=True']
    assert quant_main(quick(tmp_path / 'whole', extra=extra)) == 0

    def killed(runner, limits):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr('pfcr_mm.analysis.report.report_run', killed)
        MMLogger._instance_dict.clear()
        with pytest.raises(Killed):
            quant_main(quick(tmp_path / 'run', extra=extra))
    assert (tmp_path / 'run' / 'report.json').exists()
    assert not (tmp_path / 'run' / 'report.html').exists()
    assert run_pieces(quick(tmp_path / 'run', extra=extra), []) == 1
    assert kill_test.differences(tmp_path / 'whole', tmp_path / 'run') == []
    assert (tmp_path / 'run' / 'report.html').exists()


def test_killed_with_the_cache_in_files(quick, whole, die, tmp_path):
    """Other files and another limit after each kill change no bit, and leave nothing."""
    ways = [('unit_step', 2), ('before_unit', 4), ('after_unit', 4)]
    for memory_mb in (0, 0.2, 0, None):
        die(ways[:1])
        extra = [f'quantize_cfg.cache_memory_mb={memory_mb}',
                 f"quantize_cfg.cache_dir={tmp_path / 'cache'}"]
        MMLogger._instance_dict.clear()
        args = quick(tmp_path / 'run', '--resume', extra=extra)
        if ways:
            with pytest.raises(Killed):
                quant_main(args)
        else:
            assert quant_main(args) == 0
        del ways[:1]
    assert kill_test.differences(whole, tmp_path / 'run') == []
    assert list((tmp_path / 'cache').iterdir()) == []


def test_sigkill_at_random_moments(quick, tmp_path):
    """The system kills the process; `tools/dev/kill_test.py` does it to whole runs."""
    assert os.waitpid(forked(quick(tmp_path / 'whole', extra=BRIEF)), 0)[1] == 0
    args, moments, kills = quick(tmp_path / 'run', '--resume', extra=BRIEF), random.Random(0), 0
    while True:
        known, child = newest(tmp_path / 'run'), forked(args)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if kills < 3 and newest(tmp_path / 'run') > known:  # it has come further
                time.sleep(0.1 * moments.random())
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.002)
        if ended[0]:
            break
        kills += 1
    assert ended[1] == 0 and kills >= 2
    assert kill_test.differences(tmp_path / 'whole', tmp_path / 'run') == []


def newest(folder):
    """Number of the last checkpoint of an unfinished run."""
    files = RunCheckpoints(folder).files()
    return int(files[-1].stem) if files else 0


def forked(args):
    """Run quant_main in a child process that needs no imports; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # threads do not survive a fork
        with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere):
            os._exit(quant_main(args))
    finally:
        os._exit(9)


# --- what is not repeated, what is kept -------------------------------------

def test_calibration_and_evaluation_are_not_repeated(quick, die, tmp_path, monkeypatch):
    from pfcr_mm.engine import PFCRLoop
    parts = ['quantize_cfg.parts=[neck]']
    die([('after_unit', 1)])
    with pytest.raises(Killed):
        quant_main(quick(tmp_path / 'run', extra=parts))
    measured = []
    measure = PFCRLoop.measure
    monkeypatch.setattr(PFCRLoop, 'calibrate', lambda self: pytest.fail('calibrated again'))
    monkeypatch.setattr(PFCRLoop, 'measure', lambda self, state, model: (
        measured.append(state), measure(self, state, model)))
    assert quant_main(quick(tmp_path / 'run', '--resume', extra=parts)) == 0
    assert measured == ['quantized']


def test_without_resume_nothing_is_destroyed(quick, die, tmp_path, capsys):
    folder = tmp_path / 'run'
    die([('after_unit', 2)])
    with pytest.raises(Killed):
        quant_main(quick(folder))
    log = (folder / 'units.jsonl').read_text()
    saved = {p.name: p.read_bytes() for p in (folder / 'resume').iterdir()}
    assert len(log.splitlines()) == 2 and len(saved) == 2

    die([('after_unit', 1)])
    with pytest.raises(Killed):
        quant_main(quick(folder))
    aside = folder / 'previous-1'
    assert str(aside) in capsys.readouterr().out
    assert (aside / 'units.jsonl').read_text() == log
    assert {p.name: p.read_bytes() for p in (aside / 'resume').iterdir()} == saved
    assert len((folder / 'units.jsonl').read_text().splitlines()) == 1


def test_a_finished_run_is_not_run_again(quick, whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / 'run')
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in ('.pth', '.json')}
    assert quant_main(quick(folder, '--resume')) == 0
    assert 'finished already' in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in folder.iterdir()
            if p.suffix in ('.pth', '.json')} == before
    assert [p.name for p in (folder / 'resume').iterdir()] == ['finished.json']
    (folder / 'report.json').unlink()
    assert quant_main(quick(folder, '--resume')) == 2
    assert 'report.json cannot be read' in capsys.readouterr().err


def test_random_seed_of_the_first_piece_is_kept(quick, die, tmp_path):
    extra = [*BRIEF, 'randomness.seed=None']
    die([('after_unit', 1)])
    with pytest.raises(Killed):
        quant_main(quick(tmp_path / 'run', extra=extra))
    state = RunCheckpoints(tmp_path / 'run').newest(pytest.fail)
    assert quant_main(quick(tmp_path / 'run', '--resume', extra=extra)) == 0
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    assert str(report['seed']) == state['identity']['seed']


# --- the wrong checkpoint ---------------------------------------------------

@pytest.fixture(scope='module')
def killed(quick, tmp_path_factory):
    """The work dir of a run that was killed after its second unit."""
    folder = tmp_path_factory.mktemp('killed') / 'run'
    DieHook.moments, DieHook.action = [('after_unit', 2)], staticmethod(raise_killed)
    with pytest.raises(Killed):
        quant_main(quick(folder))
    return folder


@pytest.mark.parametrize('option, words', [
    ('quantize_cfg.reconstruction.iters=5', ['quantize_cfg.reconstruction.iters', '2', '5']),
    ('model.quant.weight_bits=3', ['model.quant.weight_bits']),
    ('randomness.seed=7', ['randomness.seed']),
    ('train_dataloader.dataset.num_images=11', ['train_dataloader.dataset.num_images']),
], ids=['iters', 'bits', 'seed', 'data'])
def test_another_config_is_refused(option, words, killed, quick, tmp_path, capsys):
    folder = shutil.copytree(killed, tmp_path / 'run')
    assert quant_main(quick(folder, '--resume', extra=[option])) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in [*words, 'another config'])
    assert len(RunCheckpoints(folder).files()) == 2
    assert len((folder / 'units.jsonl').read_text().splitlines()) == 2


def test_another_float_checkpoint_is_refused(killed, quick, tmp_path, capsys):
    folder = shutil.copytree(killed, tmp_path / 'run')
    args = quick(folder, '--resume')
    args[1] = str(demo_runs.save_tiny(tmp_path / 'other.pth', seed=3))
    assert quant_main(args) == 2
    assert 'float checkpoint' in capsys.readouterr().err


@pytest.mark.parametrize('harm', [
    lambda content: content[:len(content) // 2], lambda content: b'',
    lambda content: _flipped(content)], ids=['cut off', 'empty', 'one byte'])
def test_damage_is_seen(harm, killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / 'run')
    older, newest = RunCheckpoints(folder).files()
    newest.write_bytes(harm(newest.read_bytes()))
    with pytest.raises(UsageError, match='damaged'):
        read_run(newest)
    told = []
    assert len(RunCheckpoints(folder).newest(told.append)['records']) == 1
    assert len(told) == 1 and str(newest) in told[0]


def test_a_damaged_checkpoint_is_skipped(killed, quick, whole, tmp_path, capsys):
    folder = shutil.copytree(killed, tmp_path / 'run')
    newest = RunCheckpoints(folder).files()[-1]
    newest.write_bytes(_flipped(newest.read_bytes()))
    assert quant_main(quick(folder, '--resume')) == 0
    assert f'{newest} is damaged' in capsys.readouterr().out
    assert kill_test.differences(whole, folder) == []


def _flipped(content):
    content = bytearray(content)
    content[len(content) // 2] ^= 1
    return bytes(content)


def test_only_damaged_checkpoints(killed, quick, tmp_path, capsys):
    folder = shutil.copytree(killed, tmp_path / 'run')
    for path in RunCheckpoints(folder).files():
        path.write_bytes(b'')
    assert quant_main(quick(folder, '--resume')) == 2
    assert 'without --resume' in capsys.readouterr().err
    assert len(RunCheckpoints(folder).files()) == 2


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'), )

    path = tmp_path / '000001.pth'
    torch.save(dict(format='pfcr_mm.run/1', notes=Evil()), path)
    with pytest.raises(UsageError):
        read_run(path)
    assert not (tmp_path / 'owned').exists()


# --- signals ----------------------------------------------------------------

@pytest.mark.parametrize('stage, signum, code', [
    ('unit_step', signal.SIGTERM, 143), ('unit_step', signal.SIGINT, 130),
    ('after_test_iter', signal.SIGTERM, 143)], ids=['term', 'int', 'evaluating'])
def test_a_signal_stops_and_saves(stage, signum, code, quick, die, tmp_path, capsys):
    """With an interval that saves no unit by itself, the finished units are there."""
    extra = [*BACKBONE, 'quantize_hooks.4.interval=3600']
    if stage == 'after_test_iter':
        extra.append('quantize_cfg.evaluate.float=True')
    die([(stage, 6)], lambda: os.kill(os.getpid(), signum))
    assert quant_main(quick(tmp_path / 'run', extra=extra)) == code
    line, = capsys.readouterr().err.strip().splitlines()
    assert signal.Signals(signum).name in line and '--resume' in line
    assert not (tmp_path / 'run' / 'run.lock').exists()
    state = RunCheckpoints(tmp_path / 'run').newest(pytest.fail)
    if stage == 'after_test_iter':
        assert state is None  # nothing was done yet
        return
    # steps 1, 2 + 3, 4, 5 + 6: the unit of the last step is lost
    assert len(state['records']) == len((tmp_path / 'run/units.jsonl').read_text().splitlines())
    assert len(state['records']) == 3
    assert read_run(RunCheckpoints(tmp_path / 'run').files()[-2])['records'] == []
    if signum == signal.SIGINT:
        assert quant_main(quick(tmp_path / 'run', '--resume', extra=extra)) == 0
        assert quant_main(quick(tmp_path / 'whole', extra=extra)) == 0
        assert kill_test.differences(tmp_path / 'whole', tmp_path / 'run') == []


def test_a_signal_before_all_else_leaves_nothing_to_save():
    """It may come within another hook's `before_quantize`: no attribute is missing then."""
    UnitCheckpointHook().on_stop(runner=None)


def test_signals_wait_where_they_are_deferred():
    with pytest.raises(Stopped), StopSignals() as stop:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            reached = True
        pytest.fail('not stopped at the end of the block')
    assert reached
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_does_not_wait():
    with pytest.raises(Stopped), StopSignals() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        pytest.fail('still there')


# --- one run at a time ------------------------------------------------------

@pytest.fixture()
def other_process(tmp_path):
    """A process that holds the lock of `tmp_path`."""
    script = ('import sys; from pfcr_mm.engine.lock import WorkDirLock\n'
              f'with WorkDirLock({str(tmp_path)!r}): print("in", flush=True); sys.stdin.read()')
    process = subprocess.Popen([sys.executable, '-c', script], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip().endswith('in')
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused(other_process, quick, tmp_path, capsys):
    assert quant_main(quick(tmp_path)) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert str(other_process.pid) in line and str(tmp_path) in line
    assert [p.name for p in tmp_path.iterdir()] == ['run.lock']
    other_process.kill()
    other_process.wait()
    assert (tmp_path / 'run.lock').exists()  # stale
    with WorkDirLock(tmp_path):
        pass
    assert not (tmp_path / 'run.lock').exists()


def test_a_lock_is_not_kept_by_children(tmp_path):
    """Data loading processes outlive a kill by seconds; they must not block the resume."""
    with WorkDirLock(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.1)
        handle = os.open(tmp_path / 'run.lock', os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_process_may_enter_its_lock_again(tmp_path):
    with WorkDirLock(tmp_path), WorkDirLock(tmp_path):
        assert (tmp_path / 'run.lock').exists()


# --- a full disk ------------------------------------------------------------

def test_disk_full(quick, die, tmp_path, capsys, monkeypatch):
    """The unit's checkpoint cannot be written: one line, the one before is whole."""
    import errno

    from pfcr_mm import files
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, 'No space left on device')

    die([('before_unit', 3)], lambda: monkeypatch.setattr(files.os, 'fsync', full))
    assert quant_main(quick(tmp_path / 'run', extra=BACKBONE)) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert 'No space left' in line and '--resume' in line and '.pth' in line
    monkeypatch.setattr(files.os, 'fsync', real)
    checkpoints = RunCheckpoints(tmp_path / 'run')
    assert len(checkpoints.newest(pytest.fail)['records']) == 2
    assert not list((tmp_path / 'run').rglob('.*'))


def test_disk_full_while_caching(quick, die, tmp_path, capsys, monkeypatch):
    """The run ends in one line; with room elsewhere it goes on."""
    import errno

    from pfcr_mm.reconstruction import cache

    def full(handle, data):
        raise OSError(errno.ENOSPC, 'No space left on device')

    extra = [*BACKBONE, 'quantize_cfg.cache_memory_mb=0']
    die([('before_unit', 2)], lambda: monkeypatch.setattr(cache.os, 'write', full))
    assert quant_main(quick(tmp_path / 'run', extra=extra)) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert 'No space left' in line and '--resume' in line and 'cache_dir' in line
    monkeypatch.undo()
    assert len(RunCheckpoints(tmp_path / 'run').newest(pytest.fail)['records']) == 1
    assert not list((tmp_path / 'run').rglob('.*'))
    MMLogger._instance_dict.clear()
    assert quant_main(quick(tmp_path / 'run', '--resume', extra=BACKBONE)) == 0


def test_disk_full_keeps_the_old_file(tmp_path, monkeypatch):
    import errno

    from pfcr_mm import files
    path = tmp_path / 'report.json'
    path.write_text('old')

    def full(handle):
        raise OSError(errno.EDQUOT, 'Disk quota exceeded')

    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(FaultError, match='report.json cannot be written: Disk quota exceeded'):
        files.write_atomically(path, 'new')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


# --- other faults as the user sees them -------------------------------------

@pytest.mark.parametrize('error, words', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB'), ['out of memory']),
    (OSError(28, 'No space left on device', 'units.jsonl'), ['units.jsonl', 'No space left']),
    (RuntimeError('DataLoader worker (pid 77) is killed by signal: Killed. \nmore'),
     ['a data loading process died', 'num_workers=0']),
    (ZeroDivisionError('division by zero'), ['ZeroDivisionError', 'traceback']),
], ids=['memory', 'disk', 'worker', 'bug'])
def test_a_fault_ends_in_one_line(error, words, quick, die, tmp_path, capsys):
    def fail():
        raise error

    die([('after_test_iter', 1)], fail)
    assert quant_main(quick(tmp_path / 'run')) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
    traceback = tmp_path / 'run' / 'quant.py.traceback.txt'
    assert traceback.exists() == isinstance(error, ZeroDivisionError)


def test_a_dead_data_loading_process(quick, tmp_path, capsys):
    """A real one, killed while it loads."""
    extra = [*BRIEF, 'test_dataloader.num_workers=1', 'test_dataloader.persistent_workers=False',
             'test_dataloader.dataset.type=pfcr_mm.DyingDataset']
    assert quant_main(quick(tmp_path / 'run', extra=extra)) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert 'a data loading process died' in line


@DATASETS.register_module(force=True)
class DyingDataset(ShapesDataset):
    """Kills the process that loads from it."""

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_nan_in_a_unit_stops_where_the_config_says_so(quick, tmp_path, capsys, monkeypatch):
    from pfcr_mm.reconstruction.learned_parameters import LearnedParameters
    real = LearnedParameters.update

    def update(self):
        real(self)
        self.parameters[0].data.fill_(float('nan'))

    monkeypatch.setattr(LearnedParameters, 'update', update)
    extra = [*BRIEF, 'quantize_cfg.on_nonfinite=stop']
    assert quant_main(quick(tmp_path / 'run', extra=extra)) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert 'neck' in line and 'nan' in line and "on_nonfinite='restore'" in line
    assert quant_main(quick(tmp_path / 'run', '--resume', extra=BRIEF)) == 0
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    assert [unit['accepted'] for unit in report['units']] == [False] * len(report['units'])
    assert any('NaN' in note and 'neck.' in note for note in report['notes'])
