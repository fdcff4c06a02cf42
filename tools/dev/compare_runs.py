"""Compare runs of one config and seed, such as those of one and of several processes.

    python tools/dev/compare_runs.py work_dirs/one work_dirs/two work_dirs/three

Prints a line for each run after the first: how far losses and AP are from the first run's,
how many decisions differ, and whether the weights have the same bits. Exit code 1 where a
loss is further away than 1e-4, relatively, an AP than 0.002, or a decision is another one;
2 where there is nothing to compare.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

LOSS, METRIC = 1e-4, 0.002


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('first', type=Path, help='work dir of a run that has ended')
    parser.add_argument('others', type=Path, nargs='+', help='work dirs to compare with it')
    args = parser.parse_args()
    first = _Run(args.first)
    return int(not all([tell(first, _Run(other)) for other in args.others]))


class _Run:

    def __init__(self, folder):
        self.folder = folder
        try:
            self.report = json.loads((folder / 'report.json').read_text())
            self.state = torch.load(folder / 'quantized.pth', weights_only=True)['state_dict']
        except FileNotFoundError as error:
            _refuse(f'{error.filename} is missing: the run has not ended')
        self.units = {(u['pos_stage'], u['chain'], u['level'], u['name']): u
                      for u in self.report['units']}


def tell(first, other):
    """Print how `other` differs from `first`; whether it is near enough."""
    if list(first.units) != list(other.units):
        _refuse(f'{first.folder} and {other.folder} have not the same units: they are runs of '
                'different configs')
    pairs = [(first.units[key], other.units[key]) for key in first.units]
    loss = max((_apart(a[key], b[key], relative=True)
                for a, b in pairs for key in ('loss_before', 'loss_after')), default=0.0)
    decisions = sum(a['accepted'] != b['accepted'] for a, b in pairs)
    metrics = {key: _apart(value, other.report['quantized'][key])
               for key, value in first.report['quantized'].items()}
    bits = first.state.keys() == other.state.keys() and all(
        _bits(value) == _bits(other.state[key]) for key, value in first.state.items())
    print(f"{other.folder}, {other.report['processes']} processes against "
          f"{first.report['processes']}: {len(pairs)} units, losses within {loss:.1e}, "
          f'{decisions} decisions differ, '
          + ', '.join(f'{key} within {value:.4f}' for key, value in metrics.items())
          + f", weights {'the same to the bit' if bits else 'differ'}")
    return loss <= LOSS and not decisions and max(metrics.values(), default=0.0) <= METRIC


def _apart(first, other, relative=False):
    """How far two numbers are apart; a report has None for what is none."""
    if first == other:
        return 0.0
    if None in (first, other):
        return math.inf
    return abs(first - other) / (max(abs(first), 1e-12) if relative else 1)


def _bits(tensor):
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, flat.numpy().tobytes()


def _refuse(text):
    print(f'compare_runs.py: error: {text}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
    sys.exit(main())
