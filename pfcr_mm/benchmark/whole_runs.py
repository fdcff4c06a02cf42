"""Memory and seconds of whole runs, by number of calibration images."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..errors import UsageError

CONFIG = Path(__file__).parents[1] / '.mim/configs/demo/pfcr_maskrcnn_swin_demo_w4a4.py'
# Where images and activations are kept: all in memory, all in files.
KEPT = dict(memory=None, disk=0)
# Few steps of few units: what is left is making, keeping and reading activations.
BRIEF = ('quantize_cfg.levels=[block]', 'quantize_cfg.head_levels=[chain]',
         'quantize_cfg.pos.mode=off', 'quantize_cfg.total_iters=50',
         'quantize_cfg.calibration.search_images=16', 'quantize_cfg.calibration.rows=512',
         'quantize_cfg.calibration.method=minmax', 'quantize_cfg.evaluate.float=False',
         'quantize_cfg.evaluate.calibrated=False', 'quantize_hooks.6.enabled=False',
         'randomness.seed=0')


def measure_runs(counts, options=()):
    """Quantize with each number of images, kept in memory and on disk, in processes of their own.

    Args:
        counts (Sequence[int]): numbers of calibration images, 1 or more.
        options (Sequence[str]): for the demo config behind those of `BRIEF`, as on the command
            line of tools/quant.py. Images are drawn on the fly.

    Returns:
        dict: `peak_memory_mb` and `seconds` by where activations are kept, then by number of
        images; `seconds` by phase, `total` (wall) and `cpu` (of all threads and children)
        included. Empty without counts.

    Raises:
        UsageError: a number is none, or a run has failed.
    """
    for count in counts:
        if count < 1:
            raise UsageError(f'--images {count} is not an integer of 1 or more')
    memory, seconds = ({kept: {} for kept in KEPT} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            for kept, limit in KEPT.items():
                report = _run(Path(folder), f'{count}-{kept}', [
                    *BRIEF, *_data(folder, max(counts)),
                    f'quantize_cfg.calibration.images={count}',
                    f'quantize_cfg.cache_memory_mb={limit}', *options])
                memory[kept][str(count)] = round(report['peak_memory_mb'], 1)
                seconds[kept][str(count)] = {
                    **{name: round(phase['seconds'], 2)
                       for name, phase in report['phases'].items()},
                    'total': round(report['seconds'], 2), 'cpu': round(report['cpu'], 2)}
    return dict(peak_memory_mb=memory, seconds=seconds) if counts else {}


def _data(folder, count):
    root = f'{folder}/data/'
    return [*(f'{name}_dataloader.dataset.data_root={root}' for name in ('train', 'val', 'test')),
            f'test_evaluator.ann_file={root}annotations/instances_val.json',
            f'train_dataloader.dataset.num_images={count}',
            *(f'{name}_dataloader.dataset.num_images=8' for name in ('val', 'test'))]


def _run(folder, name, options):
    """The report of one run, with its CPU seconds as `cpu`."""
    command = [sys.executable, '-m', 'pfcr_mm.cli', 'quant', CONFIG, '--work-dir', folder / name,
               '--cfg-options', *options]
    before = os.times()
    done = subprocess.run(
        [str(word) for word in command], text=True, capture_output=True,
        env={**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())})
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ['no message']
        raise UsageError(f'the run {name} has failed: {lines[-1]}')
    after = os.times()
    report = json.loads((folder / name / 'report.json').read_text())
    cpu = (after.children_user + after.children_system
           - before.children_user - before.children_system)
    return dict(report, cpu=cpu)
