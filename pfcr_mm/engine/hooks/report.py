"""`report.json` and `report.md` in the work dir."""
import json
import math
from dataclasses import asdict
from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook

from ... import parallel
from ...files import write_atomically
from ...models.fit import MOVED
from ...models.manifest import layer_entries
from ...registry import HOOKS
from ..fingerprint import fingerprint
from ..loops import CHECKPOINT
from ..method import labels, method_name
from ..metrics import AGREEMENT, agreements, titles
from ..per_class import split_classes
from ..phases import peak_memory_mb

_STATES = ('float', 'calibrated', 'quantized')


@HOOKS.register_module()
class ReportHook(Hook):
    """Writes the report and prints its table."""

    priority = 'LOW'

    @master_only
    def after_quantize(self, runner):
        """Collect, write, print."""
        report = build_report(runner)
        folder = Path(runner.work_dir)
        text = json.dumps(finite(report), indent=1, allow_nan=False)
        write_atomically(folder / 'report.json', text + '\n')
        write_atomically(folder / 'report.md', markdown(report))
        runner.logger.info('\n'.join(['Result', *table(report)]))
        runner.logger.info(f'Wrote {folder / CHECKPOINT}, report.json and report.md')


def build_report(runner):
    """The contents of `report.json`.

    Args:
        runner (QuantRunner): after its loop has run.

    Returns:
        dict: plain data; AP and accuracies from 0 to 1, sizes in MB (10**6 bytes), times
        in seconds.
    """
    loop = runner.quantize_loop
    model, quant = runner.model, runner.model.quant_config
    layers = layer_entries(model)
    metrics = {state: split_classes(found) for state, found in loop.all_metrics.items()}
    return dict(
        model=type(model).__name__,
        method=method_name(runner.cfg, loop.records),
        bits=dict(weight=quant.weight_bits, activation=quant.activation_bits),
        **{state: loop.metrics.get(state) for state in _STATES},
        val=loop.val_metrics or None,
        size_mb=dict(float=float_size_bytes(model) / 1e6, quantized=loop.size_bytes / 1e6),
        seconds=loop.seconds,
        checkpoint_seconds=loop.checkpoint_seconds,
        peak_memory_mb=max(  # a resumed run's earlier pieces are in its phases
            [peak_memory_mb(), *(phase['peak_memory_mb'] for phase in loop.phases.values())]),
        calibration=dict(
            images=loop.learned_on + loop.held_out,
            split='own dataset' if loop.calibration['dataset'] else 'train'),
        seed=loop.seed,
        processes=parallel.world_size(),
        config=fingerprint(runner.cfg),
        pos=loop.pos.mode,
        phases=loop.phases,
        notes=loop.notes,
        parts_without_chain=loop.without_chain,
        metrics={state: plain for state, (plain, _) in metrics.items()},
        classes={state: classes for state, (_, classes) in metrics.items() if classes},
        units=[asdict(record) for record in loop.records],
        layers=layers)


def float_size_bytes(model):
    """Bytes of the model's parameters and norm statistics in float32, quantizers left out."""
    names = ('_quantizer.', 'relative_position_index', *MOVED)
    return 4 * sum(
        value.numel() for key, value in model.state_dict().items()
        if not any(name in key for name in names))


def table(report):
    """The result as lines of a Markdown table.

    Args:
        report (dict): see `build_report`.

    Returns:
        list[str]: one row a state: box AP and mask AP, or top-1 and top-5 (in percent), what
        `AgreementHook` measured, size.
    """
    bits = report['bits']
    shown = titles(*(report.get(state) for state in _STATES))
    agreement = agreements(report)
    rows = [('', *shown.values(), *(AGREEMENT.values() if agreement else ()), 'size (MB)')]
    for state, label in labels(report).items():
        metrics = report.get(state)
        if not metrics:
            continue
        if state != 'float':
            label = f"W{bits['weight']}A{bits['activation']} {label}"
        size = report['size_mb']['float' if state == 'float' else 'quantized']
        rows.append((label, *(_percent(metrics, key, report.get('float'), state)
                              for key in shown), *_agreement(agreement, state), f'{size:.2f}'))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['| ' + ' | '.join(cell.ljust(w) for cell, w in zip(row, widths)) + ' |'
             for row in rows]
    lines.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
    return lines


def markdown(report):
    """The contents of `report.md`."""
    measure = 'accuracy' if 'top1' in titles(*(report.get(s) for s in _STATES)) else 'AP'
    lines = [
        f"# {report['model']}, W{report['bits']['weight']}A{report['bits']['activation']}, "
        f"{labels(report)['quantized']}", '',
        f"Calibrated on {report['calibration']['images']} images of the "
        f"{report['calibration']['split']} split, POS {report['pos']}, seed {report['seed']}, "
        f"{report['seconds']:.0f} s, peak memory {report['peak_memory_mb']:.0f} MB. "
        f'{measure} in percent; in brackets the share of the float {measure}.', '',
        *table(report), ''
    ]
    if report['notes']:
        lines += ['## Notes', '', *(f'- {note}' for note in report['notes']), '']
    lines += ['## Phases', '', '| phase | seconds |', '|---|---|']
    lines += [f"| {name} | {phase['seconds']:.1f} |" for name, phase in report['phases'].items()]
    lines += ['', '## Units', '',
              '| stage | level | unit | loss before | loss after | |', '|---|---|---|---|---|---|']
    for unit in report['units']:
        verdict = 'accepted' if unit['accepted'] else 'restored'
        lines.append(f"| {unit['pos_stage']} | {unit['level']} | {unit['name']} | "
                     f"{unit['loss_before']:.5f} | {unit['loss_after']:.5f} | {verdict} |")
    apart = any('class_tokens' in layer for layer in report['layers'])
    lines += ['', '## Layers', '', '| layer | kind | weight bits | input bits | skipped |'
              + ' class tokens |' * apart, '|---|---|---|---|---|' + '---|' * apart]
    for layer in report['layers']:
        lines.append(f"| {layer['name']} | {layer['kind']} | {layer['weight_bits'] or ''} | "
                     f"{layer['activation_bits'] or ''} | {layer['skipped_reason'] or ''} |"
                     + f" {layer.get('class_tokens', '')} |" * apart)
    return '\n'.join(lines) + '\n'


def finite(value):
    """The same data with None for numbers that JSON does not have (a diverged loss)."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _percent(metrics, key, reference, state):
    if key not in metrics:
        return '-'
    text = f'{100 * metrics[key]:.1f}'
    if state != 'float' and reference and reference.get(key):
        text += f' ({100 * metrics[key] / reference[key]:.1f}%)'
    return text


def _agreement(agreement, state):
    if not agreement:
        return ()
    found = agreement.get(state)
    return (f"{found['kl']:.3f}", f"{100 * found['same']:.1f}") if found else ('-', '-')
