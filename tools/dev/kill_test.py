"""Kill a run at random moments, resume it each time, compare what comes out.

    python tools/dev/kill_test.py configs/demo/pfcr_maskrcnn_swin_demo_w4a4.py \
        --work-dir work_dirs/kill_test --kills 50 --per-run 5

One run is left alone, and it is noted when each of its units was done. The others are killed
by SIGKILL when they come to random moments of that time, `--per-run` each, and resumed until
they end. `quantized.pth` and `quantized.safetensors` must have the same
bytes as those of the run that was left alone, report and unit log the same figures
(except times and memory). Exit code 1 where one differs.
"""
import argparse
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

TOOL = Path(__file__).parents[1] / 'quant.py'
BYTES = ('quantized.pth', 'quantized.safetensors')
_VARYING = ('seconds', 'checkpoint_seconds', 'peak_memory_mb', 'data_time', 'time')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('--work-dir', required=True, help='folder of the runs, made new')
    parser.add_argument('--kills', type=int, default=50, help='kills in all')
    parser.add_argument('--per-run', type=int, default=5, help='kills of one run')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--fork', action='store_true',
                        help='fork processes that have everything imported: more kills an hour')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='passed on to quant.py')
    args = parser.parse_args()

    folder, moments = Path(args.work_dir), random.Random(args.seed)
    folder.mkdir(parents=True)
    start = forked if args.fork else started
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    command = [args.config, *options]
    reference = folder / 'reference'
    code, times = attend(start(command, reference, folder / 'reference.log'), reference)
    if code:
        sys.exit(f'the run that was left alone failed: see {folder}/reference.log')
    print(f'left alone: {times[-1]:.0f} s, {len(times) - 1} units', flush=True)

    kills = equal = runs = same = 0
    while kills < args.kills:
        name = f'killed-{runs}'
        count = min(args.per_run, args.kills - kills)
        killed = run_killed(start, command, folder / name, folder / f'{name}.log', times,
                            sorted(moments.uniform(0, times[-1]) for _ in range(count)))
        differing = differences(reference, folder / name)
        print(f'{name}: {killed} kills, ' + (', '.join(differing) or 'the same result'), flush=True)
        kills, runs = kills + killed, runs + 1
        equal, same = equal + killed * (not differing), same + (not differing)
    print(f'{equal} of {kills} kills ended in the same bytes, {same} of {runs} runs')
    return int(equal < kills)


def started(command, work_dir, log, *flags):
    """Start a run as a group of processes of its own; its output is appended to `log`.

    Returns:
        tuple[callable]: poll, which gives the exit code or None, and kill.
    """
    arguments = [command[0], '--work-dir', str(work_dir), *flags, *command[1:]]
    with open(log, 'a') as output:
        process = subprocess.Popen([sys.executable, str(TOOL), *arguments], stdout=output,
                                   stderr=output, start_new_session=True)

    def kill():
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    return process.poll, kill


def forked(command, work_dir, log, *flags):
    """`started` without the imports: a copy of this process runs the tool on one thread."""
    import torch

    import pfcr_mm.engine  # noqa: F401
    from pfcr_mm.cli import quant_main
    arguments = [command[0], '--work-dir', str(work_dir), *flags, *command[1:]]

    def run():
        torch.set_num_threads(1)  # threads do not survive a fork
        with open(log, 'a') as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.exit(quant_main(arguments))

    process = multiprocessing.get_context('fork').Process(target=run)
    process.start()

    def kill():
        process.kill()
        process.join()

    return lambda: process.exitcode, kill


def attend(piece, work_dir, times=(), moment=math.inf):
    """Wait for the end of a run, or until it is where the first one was at `moment`, and kill it.

    Args:
        piece (tuple[callable]): see `started`.
        work_dir (Path): of the run.
        times (Sequence[float]): what this gave for the run that is left alone.
        moment (float): seconds of that run.

    Returns:
        tuple[int | None, list[float]]: the exit code, None if it was killed; and the seconds
        at which units were done, and the run at last.
    """
    poll, kill = piece
    began = since = time.time()
    done, seen = units_done(work_dir), []
    while poll() is None:
        time.sleep(0.05)
        count, now = units_done(work_dir), time.time()
        if count != done:
            seen += [now - began] * (count - done)
            done, since = count, now
        behind = times[done - 1] if times and done else 0
        if behind + now - since >= moment:
            kill()
            return None, seen
    return poll(), [*seen, time.time() - began]


def run_killed(start, command, work_dir, log, times, moments):
    """Run to the end, killed at these moments on the way; returns how many kills it took."""
    for killed, moment in enumerate([*moments, math.inf]):
        code, _ = attend(start(command, work_dir, log, '--resume'), work_dir, times, moment)
        if code == 0:
            return killed
        if code is not None:
            sys.exit(f'a piece ended with code {code}: see {log}')
        print(f'  killed at {moment:.1f} s, {units_done(work_dir)} units done', flush=True)


def units_done(work_dir):
    """Lines of a run's unit log."""
    units = work_dir / 'units.jsonl'
    return units.read_text().count('\n') if units.exists() else 0


def differences(one, other):
    """Names of what two finished runs differ in."""
    differing = [name for name in BYTES if (one / name).exists()
                 and (one / name).read_bytes() != (other / name).read_bytes()]
    for name, read in (('report.json', read_report), ('units.jsonl', read_units)):
        if read(one / name) != read(other / name):
            differing.append(name)
    left = [p.name for p in other.iterdir() if p.name.startswith(('.', 'run.lock', 'previous-'))]
    return differing + left


def read_report(path):
    """The figures of a report, without times and memory."""
    return _timeless(json.loads(path.read_text()))


def read_units(path):
    """The lines of a unit log, without times and memory."""
    return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items()
                if k not in _VARYING}
    if isinstance(value, list):
        return [_timeless(v) for v in value]
    return value


if __name__ == '__main__':
    sys.exit(main())
