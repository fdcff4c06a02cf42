"""Run configs over seeds, collect AP in a CSV, and print a table.

    python tools/run_matrix.py CONFIG [CONFIG ...] --seeds 0 1 2 --out results/demo.csv

Each run is a process of its own in work_dirs/matrix/CONFIG_seedN. A run whose report
is there is not repeated, unless its config has changed since; one that was cut short goes
on where it was. A run that fails is told in one line, the others go on, and the exit code
is 1. --no-run only collects reports.

Columns: config, weight_bits, activation_bits, seed, iterations (of all units), then box
and mask AP of the float, the calibrated and the quantized model, seconds. Rows of other
configs that the CSV holds already stay.

With --long a row for each state of the model and split: config, bits, method, seed, split,
box and mask AP. The split is 'test', and 'val' where quantize_cfg.evaluate.val is on.
"""
import argparse
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

from pfcr_mm.cli import quant_config
from pfcr_mm.engine.fingerprint import fingerprint
from pfcr_mm.engine.method import labels
from pfcr_mm.engine.resume import RunCheckpoints
from pfcr_mm.errors import UsageError
from pfcr_mm.files import write_atomically

QUANT = Path(__file__).with_name('quant.py')
STATES = ('float', 'calibrated', 'quantized')
METRICS = ('bbox_mAP', 'segm_mAP')
COLUMNS = ('config', 'weight_bits', 'activation_bits', 'seed', 'iterations',
           *(f'{state}_{metric}' for state in STATES for metric in METRICS), 'seconds')
LONG_COLUMNS = ('config', 'bits', 'method', 'seed', 'split', *METRICS)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', help='configs with quantize_cfg')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--out', required=True, help='CSV to write')
    parser.add_argument('--work-dir', default='work_dirs/matrix', help='folder of the runs')
    parser.add_argument('--no-run', action='store_true', help='collect the reports that are there')
    parser.add_argument('--long', action='store_true', help='a row for each state and split')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='passed on to quant.py')
    args = parser.parse_args(argv)

    runs = [(config, seed) for config in args.configs for seed in args.seeds]
    out = Path(args.out)
    named = {(Path(config).stem, str(seed)) for config, seed in runs}
    kept = [r for r in read_csv(out) if (r['config'], r['seed']) not in named]
    rows, written, failed = [], [], 0
    for config, seed in runs:
        name = f'{Path(config).stem} seed {seed}'
        folder = Path(args.work_dir) / f'{Path(config).stem}_seed{seed}'
        arguments = [config, '--work-dir', str(folder), '--cfg-options',
                     f'randomness.seed={seed}', *args.cfg_options]
        report, ok = report_of(name, folder, arguments, args.no_run)
        failed += not ok
        if report is None:
            continue
        rows.append(row(Path(config).stem, report))
        written += long_rows(Path(config).stem, report) if args.long else rows[-1:]
        write_csv(kept + written, out, LONG_COLUMNS if args.long else COLUMNS)
    print('\n'.join(table(rows)))
    if failed:
        print(f'run_matrix: {failed} of {len(runs)} runs failed', file=sys.stderr)
    return 1 if failed else 0


def report_of(name, folder, arguments, no_run, program='run_matrix'):
    """The report of a run that is done already or is done now, telling what happens.

    Args:
        name (str): the run's, for the lines told.
        folder (Path): its work dir.
        arguments (list[str]): of tools/quant.py.
        no_run (bool): only look at what is there.
        program (str): who tells it.

    Returns:
        tuple[dict | None, bool]: the report, None where there is none; False where the run
        failed.
    """
    try:
        report = done(folder, arguments)
        if report is None and not no_run:
            print(f'{program}: {name}: running', flush=True)
            run(arguments, folder)
            report = done(folder, arguments)
            if report is None:
                raise RuntimeError('it ended without a report of this config')
    except (UsageError, RuntimeError, OSError) as error:
        print(f'{program}: {name}: failed: {error}', file=sys.stderr, flush=True)
        return None, False
    if report is None:
        print(f'{program}: {name}: not done', flush=True)
    return report, True


def done(folder, arguments):
    """The report of a finished run, or None where it is missing or of another config."""
    expected = fingerprint(quant_config(arguments))
    try:
        report = json.loads((folder / 'report.json').read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return report if report.get('config') == expected else None


def run(arguments, folder):
    """Quantize in a new process; RuntimeError with one line where it fails.

    A run that was cut short goes on. Whatever it says on stderr stays in `stderr.txt` of
    the run's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    resume = ['--resume'] if RunCheckpoints(folder).files() else []
    code, line = _process([*arguments, *resume], folder)
    if resume and code == 2:  # what is there belongs to another config: start over
        code, line = _process(arguments, folder)
    if code < 0:
        raise RuntimeError(f'killed by signal {-code} (out of memory?)')
    if code:
        raise RuntimeError(line or f'exit code {code}')


def _process(arguments, folder):
    """(exit code, last line of stderr) of tools/quant.py."""
    with (folder / 'stderr.txt').open('w+') as stderr:
        code = subprocess.run([sys.executable, str(QUANT), *arguments], stderr=stderr).returncode
        stderr.seek(0)
        lines = [line.strip() for line in stderr if line.strip()]
    return code, lines[-1] if lines else ''


def row(name, report):
    """One CSV row from a report."""
    return dict(
        config=name, weight_bits=report['bits']['weight'],
        activation_bits=report['bits']['activation'], seed=report['seed'],
        iterations=sum(unit['iters'] for unit in report['units']),
        **{f'{state}_{metric}': (report[state] or {}).get(metric)
           for state in STATES for metric in METRICS},
        seconds=round(report['seconds']))


def long_rows(name, report):
    """CSV rows from a report, one for each state and split that was measured."""
    bits = f"w{report['bits']['weight']}a{report['bits']['activation']}"
    return [dict(config=name, bits=bits, method=label, seed=report['seed'], split=split,
                 **{metric: found[state].get(metric) for metric in METRICS})
            for split, found in (('test', report), ('val', report.get('val') or {}))
            for state, label in labels(report).items() if found.get(state)]


def read_csv(path):
    """Rows of an earlier CSV, as strings; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def write_csv(rows, path, columns):
    """Write all rows; the file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def table(rows):
    """A Markdown table, a line a config: mean and range over seeds, share of the float AP.

    Args:
        rows (list[dict]): from `row`.

    Returns:
        list[str]: lines; box and mask AP in percent.
    """
    lines = ['| config | bits | seeds | | box AP | mask AP |', '|---|---|---|---|---|---|']
    for name in dict.fromkeys(r['config'] for r in rows):
        group = [r for r in rows if r['config'] == name]
        bits = f"W{group[0]['weight_bits']}A{group[0]['activation_bits']}"
        for state, label in labels({}).items():  # rows do not say the method
            cells = [_cell(group, state, metric) for metric in METRICS]
            if any(cell != '-' for cell in cells):
                lines.append(f'| {name} | {bits} | {len(group)} | {label} | '
                             f'{cells[0]} | {cells[1]} |')
    return lines


def _cell(rows, state, metric):
    values = [100 * r[f'{state}_{metric}'] for r in rows if r[f'{state}_{metric}'] is not None]
    if not values:
        return '-'
    mean = sum(values) / len(values)
    text = f'{mean:.1f}'
    if max(values) > min(values):
        text += f' [{min(values):.1f}..{max(values):.1f}]'
    reference = [100 * r[f'float_{metric}'] for r in rows if r[f'float_{metric}']]
    if state != 'float' and reference:
        text += f' ({100 * mean * len(reference) / sum(reference):.1f}%)'
    return text


if __name__ == '__main__':
    sys.exit(main())
