"""tools/sensitivity.py: calibrate, rank, write."""
import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

from ..cli import build_runner
from ..engine.hooks.report import finite
from ..engine.metrics import counted
from ..errors import UsageError
from ..files import write_atomically
from ..models.reparam import fold_alike
from ..reconstruction import LEVELS, harden
from ..registry import DATASETS
from .probe import evenly, probe_images
from .sensitivity import as_data, groups_of, plot, sensitivity, suggestion
from .style import png

SHOWN = 15


def rank(cfg, level, by_ap=False, count=None, bits=8):
    """Calibrate the model of a config, rank its layers or units, write what came out.

    Args:
        cfg (Config): with `load_from`, the float checkpoint.
        level (str): one of LEVELS.
        by_ap (bool): measure AP on the images too, and rank by it.
        count (int | None): images of the test split.
        bits (int): of the suggestion, 2 to 8.

    Returns:
        list[Entry]: the most sensitive first.

    Raises:
        UsageError: a mistake in the arguments or the config.
    """
    _check(level, count, bits)
    runner = build_runner(cfg)
    model, floating = calibrated_pair(runner)
    if not groups_of(model, level):
        raise UsageError(f'--level {level}: the model has no unit of this level')
    count = count or (50 if by_ap else 4)
    images, _, missing = probe_images(cfg, model, min(count, 8) if by_ap else count)
    if not images:
        raise UsageError(f'no image of the test split can be read: {missing[0]}')

    def tell(number, of, name):
        runner.logger.info(f'[{number + 1}/{of}] {name}')

    measure = subset_measure(runner, count) if by_ap else None
    entries = sensitivity(floating, model, images, level, measure, tell)
    metric = next(iter(entries[0].metrics)) if by_ap else None
    folder = Path(runner.work_dir)
    data = finite(dict(level=level, images=len(images), metric=metric, entries=as_data(entries)))
    write_atomically(folder / 'sensitivity.json', json.dumps(data, indent=1) + '\n')
    write_atomically(folder / 'sensitivity.png', png(plot(entries, level, metric)))
    base = os.path.relpath(os.path.abspath(cfg.filename), os.path.abspath(folder))
    write_atomically(folder / 'sensitivity_overrides.py', suggestion(
        entries, base, cfg.model.get('quant'), bits))
    for entry in entries[:SHOWN]:
        measured = (f', {metric} {100 * entry.metrics[metric]:.1f}% ({-100 * entry.lost:+.1f})'
                    if metric else '')
        lost = 'nothing lost' if entry.sqnr_db is None else f'{entry.sqnr_db:6.1f} dB'
        print(f'{lost}{measured}  {entry.name}')
    print(f'Wrote {folder}/sensitivity.json, .png and sensitivity_overrides.py (a config for '
          'tools/quant.py)')
    return entries


def calibrated_pair(runner):
    """Calibrate as tools/quant.py would.

    Returns:
        tuple[nn.Module, nn.Module]: the calibrated model, hardened; its float twin, folded
        alike.
    """
    runner.want_float()
    loop = runner.build_quantize_loop()
    runner.load_or_resume()
    loop.prepare()
    loop.calibrate()
    fold_alike(loop.teacher, loop.enter_final_stage(loop.model))
    harden(loop.model)
    return loop.model, loop.teacher


def subset_measure(runner, count):
    """A function that tests a model on `count` images of the test split, evenly spread.

    The metric is told of the subset: images left out do not count as missed.
    """
    runner.call_hook('before_run')
    dataset = DATASETS.build(runner._test_dataloader['dataset'])
    if not hasattr(dataset, 'get_subset_'):
        raise UsageError(f'--by ap: {type(dataset).__name__} cannot be cut to a subset')
    dataset.get_subset_(evenly(count, len(dataset)))
    # a sampler counts what it has when it is built
    runner._test_dataloader = dict(runner._test_dataloader, dataset=dataset)
    loop = runner._test_loop = runner.build_test_loop(runner._test_loop)
    ids = [dataset.get_data_info(i).get('img_id') for i in range(len(dataset))]
    for metric in loop.evaluator.metrics:
        if hasattr(metric, 'img_ids'):
            metric.img_ids = ids

    def measure(model):
        own, runner.model = runner.model, model
        try:
            with redirect_stdout(io.StringIO()):
                return counted(loop.run())
        finally:
            runner.model = own

    return measure


def _check(level, count, bits):
    if level not in LEVELS:
        raise UsageError(f'--level {level!r} is not known; choose of {list(LEVELS)}')
    if count is not None and count < 1:
        raise UsageError(f'--images {count} is not 1 or more')
    if bits not in range(2, 9):
        raise UsageError(f'--bits {bits} is out of range; choose from 2 to 8')
