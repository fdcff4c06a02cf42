"""Mutated configs and damaged checkpoints against the tools: count what comes of them.

    python tools/dev/damage_test.py --work-dir work_dirs/damage_test --configs 200 --checkpoints 100

The command lines of tools/quant.py and tools/test.py run in this process, on a tiny detector
with random weights. A config has one or two keys set to something odd, deleted, renamed or
wrapped; a checkpoint (float, quantized, safetensors, or that of an unfinished run, which is
then resumed) is cut, has flipped, zeroed or inserted bytes, or tensors of a wrong type, a wrong
shape, none or foreign ones. Each case either works, to the same result where a checkpoint was
damaged, or ends in one line. Everything else is printed and kept in the work dir; exit code 1
where there is any. A case depends on seed and number alone: `--first 50` goes on behind
the first 50.
"""
import argparse
import io
import json
import os
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger

from pfcr_mm.cli import quant_main, test_main
from pfcr_mm.engine.metrics import NAMES
from pfcr_mm.engine.resume import RunCheckpoints
from pfcr_mm.errors import UsageError
from pfcr_mm.models.checkpoint import read_checkpoint
from pfcr_mm.registry import HOOKS

sys.path.insert(0, str(Path(__file__).parents[2] / 'tests'))
from demo_runs import W4A4, data_options, options_as_dict, save_tiny  # noqa: E402
from mutations import OPTIONS, edit, harm, wants_report, write_config  # noqa: E402

# What may come of a case; whatever else `judge` says is a mistake of ours.
WORKED, REFUSED, ENDED = 'worked', 'refused', 'ended on the way'
GOOD = (WORKED, REFUSED, ENDED)
KINDS = ('float.pth', 'quantized.pth', 'quantized.safetensors', 'resume.pth')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', required=True, help='folder of the cases, made new')
    parser.add_argument('--configs', type=int, default=200, help='mutated configs')
    parser.add_argument('--checkpoints', type=int, default=100, help='damaged checkpoints')
    parser.add_argument('--first', type=int, default=0, help='number of the first case of each')
    parser.add_argument('--seed', type=int, default=0, help='of edits and damage')
    args = parser.parse_args(argv)

    folder, here = Path(args.work_dir).absolute(), os.getcwd()
    folder.mkdir(parents=True)
    # MMEngine formats each config three times, which takes longer than all the rest
    unformatted = mock.patch('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
    os.chdir(folder)  # a data_root may become '' or 'x'
    try:
        with unformatted:
            bench, found = Bench(folder), {}
            for what, count, case in (('mutated configs', args.configs, mutated_config),
                                      ('damaged checkpoints', args.checkpoints,
                                       damaged_checkpoint)):
                found[what] = Counter()
                for number in range(args.first, args.first + count):
                    draw = Draw(f'{args.seed} {what} {number}')
                    found[what][bench.try_case(f"{what.split()[1][:-1]}-{number}", case, draw)] += 1
    finally:
        os.chdir(here)
    print('; '.join(summary(what, counts) for what, counts in found.items()))
    return int(any(verdict not in GOOD for counts in found.values() for verdict in counts))


def summary(what, counts):
    """What came of the cases of a kind, in words."""
    bad = {verdict: count for verdict, count in counts.items() if verdict not in GOOD}
    told = ''.join(f', {count} {verdict}' for verdict, count in sorted(bad.items()))
    return (f'{sum(counts.values())} {what}: {counts[WORKED]} worked, '
            f'{counts[REFUSED] + counts[ENDED]} ended in one line ({counts[REFUSED]} refused with '
            f'exit code 2, {counts[ENDED]} on the way with exit code 1), {sum(bad.values())} '
            f'tracebacks, half-written files or wrong results{told}')


class Draw:
    """Draws for tests/mutations.py, by a seed of its own."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def of(self, items):
        """One of them."""
        return self._random.choice(items)

    def number(self, low, high):
        """An integer, both ends included."""
        return self._random.randint(low, high)


@HOOKS.register_module(force=True)
class StopAfterUnits(Hook):
    """Interrupts a run before a unit, as Ctrl-C would."""

    def __init__(self, units):
        self.left = units

    def before_unit(self, runner, unit):
        """Count down."""
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@dataclass
class Result:
    """What a tool did."""

    code: int | None  # None: an exception came out of it
    out: str
    err: str


def call(tool, *arguments):
    """Run a command line in this process, anew."""
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            handler.close()
    MMLogger._instance_dict.clear()
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = tool([str(a) for a in arguments])
        except BaseException:
            code = None
            traceback.print_exc()
    return Result(code, out.getvalue(), err.getvalue())


class Bench:
    """A folder with a tiny detector, a whole run of it and one that was interrupted."""

    def __init__(self, folder):
        self.folder = folder
        cfg = Config.fromfile(W4A4)
        cfg.merge_from_dict(options_as_dict((*OPTIONS, *data_options(folder / 'shapes', 4, 2))))
        self.cfg = cfg.to_dict()
        self.config = write_config(folder / 'plain.py', self.cfg)
        with redirect_stdout(io.StringIO()):  # MMEngine says how each weight was made
            self.float = save_tiny(folder / 'float.pth')
        self.whole, self.stopped = folder / 'whole', folder / 'stopped'
        self.must(call(quant_main, self.config, self.float, '--work-dir', self.whole), 0)
        hooks = [*self.cfg['quantize_hooks'], dict(type='pfcr_mm.StopAfterUnits', units=1)]
        config = write_config(folder / 'stop.py', dict(self.cfg, quantize_hooks=hooks))
        self.must(call(quant_main, config, self.float, '--work-dir', self.stopped), 130)
        tested = call(test_main, self.config, self.whole / 'quantized.pth', '--work-dir',
                      folder / 'tested')
        self.must(tested, 0)
        self.metrics = metrics_in(tested)

    @staticmethod
    def must(result, code):
        """End where what is needed for the cases does not work."""
        if result.code != code:
            sys.exit(f'the run that nothing was done to ended with code {result.code}:\n'
                     f'{result.err}')

    def try_case(self, name, case, draw):
        """Run a case in a folder of its own, which is kept where it is bad."""
        folder = self.folder / name
        folder.mkdir()
        began = time.time()
        done, result, verdict = case(self, folder, draw)
        with open(self.folder / 'cases.log', 'a') as log:
            log.write(f'{name}: {verdict}: {done} -> {result.err.strip()[-300:]!r}, '
                      f'{time.time() - began:.1f} s\n')
        if verdict in GOOD:
            shutil.rmtree(folder)
        else:
            (folder / 'stdout.txt').write_text(result.out)
            (folder / 'stderr.txt').write_text(result.err)
            print(f'{name}: {verdict}: {done}; see {folder}', flush=True)
        return verdict


def mutated_config(bench, folder, draw):
    """tools/quant.py on a config with random edits: (what was done, result, verdict)."""
    done, cfg = edit(bench.cfg, draw)
    config = write_config(folder / 'mutated.py', cfg)
    run = folder / 'run'
    result = call(quant_main, config, bench.float, '--work-dir', run)
    verdict = judge(result, 'quant.py', folder) or judge_run(run, reports=wants_report(cfg))
    return '; '.join(done), result, verdict


def damaged_checkpoint(bench, folder, draw):
    """A tool on a damaged checkpoint: (what was done, result, verdict)."""
    kind, name, damage = harm(KINDS, draw)
    done, run = f'{name} {kind}', folder / 'run'
    if kind == 'resume.pth':
        shutil.copytree(bench.stopped, run)
        *_, kept, path = RunCheckpoints(run).files()
        path.write_bytes(damage(path.read_bytes()))
        before = kept.read_bytes()
        result = call(quant_main, bench.config, bench.float, '--work-dir', run, '--resume')
        verdict = judge(result, 'quant.py', folder) or judge_run(run, bench.whole)
        if verdict == REFUSED and (not kept.exists() or kept.read_bytes() != before):
            verdict = 'lost the checkpoint before'
        return done, result, verdict
    path = folder / kind
    source = bench.float if kind == 'float.pth' else bench.whole / kind
    path.write_bytes(damage(source.read_bytes()))
    if kind == 'float.pth':
        result = call(quant_main, bench.config, path, '--work-dir', run)
        verdict = judge(result, 'quant.py', folder) or judge_run(run, bench.whole)
        return done, result, verdict
    result = call(test_main, bench.config, path, '--work-dir', run)
    verdict = judge(result, 'test.py', folder)
    if not verdict:
        verdict = WORKED if metrics_in(result) == bench.metrics else 'wrong result'
    return done, result, verdict


def metrics_in(result):
    """The lines of a tool's output that say a metric."""
    return [line for line in result.out.splitlines() if line.partition(':')[0] in NAMES]


def judge(result, program, folder):
    """What is known from the exit code, the lines printed and partial files alone.

    Returns:
        str: '' where the tool says that it worked.
    """
    if result.code is None or 'Traceback (most recent' in result.out + result.err:
        return 'traceback'
    if any(folder.rglob('.*.tmp')):
        return 'half-written file'
    told = [line for line in result.err.splitlines() if 'error: ' in line]
    if result.code == 0:
        return 'worked and told an error' if told else ''
    if len(told) != 1 or not told[0].startswith(f'{program}: error: '):
        return 'not one line'
    return {2: REFUSED, 1: ENDED}.get(result.code, f'exit code {result.code}')


def judge_run(run, same_as=None, reports=True):
    """Whether a run that worked left whole results, those of `same_as` where it is given."""
    try:
        if reports:
            json.loads((run / 'report.json').read_text())
        state = read_checkpoint(run / 'quantized.pth')['state_dict']
    except (OSError, ValueError, UsageError):
        return 'half-written file'
    if not all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point()):
        return 'wrong result'
    if same_as is not None:
        for name in ('quantized.pth', 'quantized.safetensors'):
            if (run / name).read_bytes() != (same_as / name).read_bytes():
                return 'wrong result'
    return WORKED


if __name__ == '__main__':
    sys.exit(main())
