"""Run configs over seeds and collect AP in a CSV, one row a run.

    python tools/benchmark.py CONFIG [CONFIG ...] --seeds 0 1 2 --out results/demo.csv

Each run goes to work_dirs/benchmark/CONFIG_seedN; a run whose report is there
already is not repeated. Columns: config, weight_bits, activation_bits, seed,
iterations (of all units), then box and mask AP of the float, the calibrated and the
quantized model, seconds.
"""
import argparse
import csv
import io
import json
import sys
from pathlib import Path

from pfcr_mm.cli import quant_main
from pfcr_mm.engine.hooks.report import write_text

STATES = ('float', 'calibrated', 'quantized')
METRICS = ('bbox_mAP', 'segm_mAP')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', help='configs with quantize_cfg')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--out', required=True, help='CSV to write')
    parser.add_argument('--work-dir', default='work_dirs/benchmark', help='folder of the runs')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='passed on to quant.py')
    args = parser.parse_args()

    rows = []
    for config in args.configs:
        for seed in args.seeds:
            folder = Path(args.work_dir) / f'{Path(config).stem}_seed{seed}'
            report = folder / 'report.json'
            if not report.exists():
                code = quant_main([
                    config, '--work-dir', str(folder), '--cfg-options',
                    f'randomness.seed={seed}', *args.cfg_options])
                if code:
                    return code
            rows.append(row(Path(config).stem, json.loads(report.read_text())))
            write_csv(rows, Path(args.out))
    return 0


def row(name, report):
    """One CSV row from a report."""
    return dict(
        config=name, weight_bits=report['bits']['weight'],
        activation_bits=report['bits']['activation'], seed=report['seed'],
        iterations=sum(unit['iters'] for unit in report['units']),
        **{f'{state}_{metric}': (report[state] or {}).get(metric)
           for state in STATES for metric in METRICS},
        seconds=round(report['seconds']))


def write_csv(rows, path):
    """Write all rows; the file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


if __name__ == '__main__':
    sys.exit(main())
