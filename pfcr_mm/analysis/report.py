"""A report of a run that ends, or of any saved checkpoint."""
import json
import os
import time
from pathlib import Path

from ..engine.fingerprint import fingerprint
from ..engine.method import method_name
from ..errors import UsageError
from ..models.manifest import build_manifest
from .diagnose import diagnose, untouched
from .hook import CALIBRATED, limits_of
from .page import PAGE, write_page
from .twins import load_twin


def report_run(runner, limits=None):
    """Report on what a runner has just quantized; its loop has written report.json."""
    loop, folder, began = runner.quantize_loop, Path(runner.work_dir), time.time()
    report = json.loads((folder / 'report.json').read_text())
    notes = []
    with untouched():  # building a model draws random weights
        calibrated = _calibrated(runner.cfg, folder, report, notes)
    found, material = diagnose(runner.cfg, runner.model, loop.teacher, calibrated, notes)
    checks = write_page(folder, report, found, material, _curves(folder), limits)
    for line in check_lines(checks):
        runner.logger.warning(line)
    runner.logger.info(f'Wrote {folder / PAGE} in {time.time() - began:.0f} s (pictures included: '
                       'see report_figures/)')


def report_checkpoint(cfg, path, folder):
    """Report on a saved checkpoint.

    Args:
        cfg (Config): it was quantized with; `load_from` is the float checkpoint.
        path (str | Path): quantized checkpoint.
        folder (Path): where to write.

    Returns:
        list[dict]: the checks that found something.

    Raises:
        UsageError: a checkpoint is missing or of another model, the folder cannot be
        written to, the config's limits of checks are none.
    """
    path, folder, notes = Path(path), Path(folder), []
    limits = limits_of(cfg)
    _check_writable(folder)
    quantized = load_twin(cfg, path)
    if not hasattr(quantized, 'quant_config') or not any(
            q.calibrated for q in quantized.modules() if hasattr(q, 'calibrated')):
        raise UsageError(f'checkpoint {path} holds float weights; quantize it first with '
                         'tools/quant.py')
    report = _records(cfg, path, quantized, notes)
    floating = None
    try:
        if not cfg.get('load_from'):
            raise UsageError('the config names no float checkpoint (load_from)')
        floating = load_twin(cfg, cfg.load_from)
    except UsageError as error:
        notes.append(f'{error}; comparisons with the float model are left out (--float PATH '
                     'names its checkpoint)')
    calibrated = _calibrated(cfg, path.parent, report, notes)
    found, material = diagnose(cfg, quantized, floating, calibrated, notes)
    curves = _curves(path.parent) if 'units' in report else []
    try:
        return write_page(folder, report, found, material, curves, limits)
    except OSError as error:
        raise UsageError(f'the report cannot be written to {folder}: {error.strerror}') from None


def check_lines(checks):
    """The checks as lines of a log."""
    return [f"{check['name']}: {check['found']}. What to do: {check['advice']}"
            for check in checks]


def _records(cfg, path, quantized, notes):
    """What report.json beside the checkpoint says, or what the checkpoint says by itself."""
    try:
        report = json.loads((path.parent / 'report.json').read_text())
        if round(report['size_mb']['quantized'] * 1e6) == path.with_suffix('.pth').stat().st_size:
            report.pop('diagnostics', None)
            return report
        notes.append(f'report.json beside {path.name} is of another checkpoint; it is left out')
    except FileNotFoundError:
        notes.append(f'there is no report.json beside {path.name}: AP, time and losses of units '
                     'are left out')
    except (ValueError, KeyError, TypeError, OSError) as error:
        notes.append(f'report.json beside {path.name} cannot be read ({type(error).__name__})')
    quant = quantized.quant_config
    named = cfg.get('method') or cfg.get('method_file')  # else nobody knows
    return dict(model=type(quantized).__name__, config=fingerprint(cfg),
                method=method_name(cfg, [None]) if named else None,
                bits=dict(weight=quant.weight_bits, activation=quant.activation_bits),
                size_mb=dict(quantized=path.stat().st_size / 1e6),
                layers=build_manifest(quantized)['layers'])


def _calibrated(cfg, folder, report, notes):
    """The only calibrated model of the same run, or None."""

    def check(meta):
        if 'units' not in report or meta.get('config') != report.get('config'):
            raise UsageError(f'{CALIBRATED} is of another run')

    if not (folder / CALIBRATED).is_file():
        return None
    try:
        return load_twin(cfg, folder / CALIBRATED, check)
    except UsageError as error:
        notes.append(f'{error}; the only calibrated model is left out')
        return None


def _curves(folder):
    try:
        return [json.loads(line) for line in (folder / 'units.jsonl').read_text().splitlines()]
    except (OSError, ValueError):
        return []


def _check_writable(folder):
    """Raise UsageError where nothing can be written, before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f'.{PAGE}-{os.getpid()}.tmp'
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f'the report cannot be written to {folder}: {error.strerror}; give '
                         'another folder with --work-dir') from None
