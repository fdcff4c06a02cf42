"""Kill a run at random moments, resume it each time, compare what comes out.

    python tools/dev/kill_test.py configs/demo/pfcr_maskrcnn_swin_demo_w4a4.py \
        --work-dir work_dirs/kill_test --kills 50 --per-run 5

One run is left alone; the others are killed by SIGKILL, `--per-run` times each, and
resumed until they end. `quantized.pth` and `quantized.safetensors` must have the same
bytes as those of the run that was left alone, report and unit log the same figures
(except times and memory). Exit code 1 where one differs.
"""
import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
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
    parser.add_argument('--reference', help='work dir of a run that was left alone already')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='passed on to quant.py')
    args = parser.parse_args()

    folder, moments = Path(args.work_dir), random.Random(args.seed)
    folder.mkdir(parents=True)
    start = forked if args.fork else started
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    command = [args.config, *options]
    reference = Path(args.reference or folder / 'reference')
    if not args.reference and start(command, reference, folder / 'reference.log')(None):
        sys.exit(f'the run that was left alone failed: see {folder}/reference.log')
    seconds = json.loads((reference / 'report.json').read_text())['seconds']
    print(f'left alone: {seconds:.0f} s', flush=True)

    kills = equal = runs = same = 0
    while kills < args.kills:
        name = f'killed-{runs}'
        killed = run_killed(start, command, folder / name, folder / f'{name}.log', moments, seconds,
                            min(args.per_run, args.kills - kills))
        differing = differences(reference, folder / name)
        print(f'{name}: {killed} kills, ' + (', '.join(differing) or 'the same result'), flush=True)
        kills, runs = kills + killed, runs + 1
        equal, same = equal + killed * (not differing), same + (not differing)
    print(f'{equal} of {kills} kills ended in the same bytes, {same} of {runs} runs')
    return int(equal < kills)


def started(command, work_dir, log, *flags):
    """Start a run as a group of processes of its own; its output is appended to `log`.

    Returns:
        callable: waits so many seconds (None: for ever) for the exit code, then kills and
        returns None.
    """
    arguments = [command[0], '--work-dir', str(work_dir), *flags, *command[1:]]
    with open(log, 'a') as output:
        process = subprocess.Popen([sys.executable, str(TOOL), *arguments], stdout=output,
                                   stderr=output, start_new_session=True)

    def wait(seconds):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return wait


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

    def wait(seconds):
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None
        return process.exitcode

    return wait


def run_killed(start, command, work_dir, log, moments, seconds, kills):
    """Run to the end, killed on the way; returns how many kills it took.

    A piece lives for up to twice its share of the run, and the time a start may take.
    """
    killed = 0
    while True:
        life = moments.uniform(0, 10 + 2 * seconds / (kills + 1)) if killed < kills else None
        code = start(command, work_dir, log, '--resume')(life)
        if code == 0:
            return killed
        if code is not None:
            sys.exit(f'a piece ended with code {code}: see {log}')
        killed += 1
        units = work_dir / 'units.jsonl'
        done = len(units.read_text().splitlines()) if units.exists() else 0
        print(f'  killed after {life:.1f} s, {done} units', flush=True)


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
