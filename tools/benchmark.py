"""Measure what reconstruction costs, as ratios to float, and write it as JSON.

    python tools/benchmark.py --out FILE [--size demo|full] [--kinds KIND ...] [--images N ...]

See docs/performance.md for what is measured. `--kinds` or `--images` without a value leaves
that half out.
"""
import argparse
import json
import sys

import torch

from pfcr_mm.benchmark.cases import KINDS, SIZES
from pfcr_mm.benchmark.run import measure_units
from pfcr_mm.benchmark.timing import CLOCKS
from pfcr_mm.benchmark.whole_runs import measure_runs
from pfcr_mm.errors import UsageError
from pfcr_mm.files import write_atomically
from pfcr_mm.reconstruction.precision import DTYPES


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', required=True, help='JSON to write')
    parser.add_argument('--size', choices=SIZES, default='demo', help='width and image size')
    parser.add_argument('--kinds', nargs='*', choices=KINDS, default=list(KINDS))
    parser.add_argument('--pairs', type=int, default=15, help='measurements of each')
    parser.add_argument('--clock', choices=CLOCKS, default='wall',
                        help='cpu where other jobs share the machine')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--autocast', choices=DTYPES, help='units in mixed precision')
    parser.add_argument('--compile', action='store_true', help="units' quantizers fused")
    parser.add_argument('--cuda-graphs', action='store_true', help='steps are recorded')
    parser.add_argument('--threads', type=int, help='of torch')
    parser.add_argument('--images', nargs='*', type=int, default=[64, 512],
                        help='calibration images of whole runs of the demo config')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='of these runs, such as quantize_cfg.parts=[backbone]')
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # as runs have it
    found = {}
    try:
        for part in (
                lambda: measure_units(args.size, args.kinds, args.pairs, args.clock, args.device,
                                      dict(autocast=args.autocast, compile=args.compile,
                                           cuda_graphs=args.cuda_graphs)),
                lambda: measure_runs(args.images, args.cfg_options)):
            found.update(part())
            write_atomically(args.out, text := json.dumps(found, indent=1) + '\n')
    except UsageError as error:
        print(f'benchmark.py: error: {error}', file=sys.stderr)
        return 2
    print(text, end='')
    return 0


if __name__ == '__main__':
    sys.exit(main())
