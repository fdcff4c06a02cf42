"""The command lines of tools/report.py and tools/sensitivity.py."""
import os

from ..cli import _damage_told, _guarded, _make_work_dir, _parser, _read_config, _safe


def report_main(argv=None):
    """tools/report.py. Returns the exit code: 0, or 2 for a mistake of the user's."""
    parser = _parser('Write report.html for a quantized checkpoint.', 'report.py')
    parser.add_argument('quantized', help='checkpoint written by tools/quant.py')
    parser.add_argument('--float', dest='checkpoint', metavar='PATH',
                        help='float checkpoint (default: load_from)')
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir or os.path.dirname(args.quantized) or '.'

    def run():
        cfg = _read_config(args)
        from .page import PAGE
        from .report import check_lines, report_checkpoint
        with _damage_told(cfg), _safe(cfg):
            checks = report_checkpoint(cfg, args.quantized, args.work_dir)
        for line in check_lines(checks):
            print(f'warning: {line}')
        print(f'Wrote {os.path.join(args.work_dir, PAGE)}')

    return _guarded('report.py', run, args)


def sensitivity_main(argv=None):
    """tools/sensitivity.py. Returns the exit code: 0, or 2 for a mistake of the user's."""
    parser = _parser('Quantize one layer or unit at a time and rank them.', 'sensitivity.py')
    parser.add_argument('checkpoint', nargs='?', help='float checkpoint (default: load_from)')
    parser.add_argument('--level', default='layer',
                        help="'layer', or a level of units such as leaf, block, stage")
    parser.add_argument('--by', choices=['error', 'ap'], default='error',
                        help='error of the outputs, or AP on the images (slow)')
    parser.add_argument('--images', type=int, help='of the test split (default: 4; AP: 50)')
    parser.add_argument('--bits', type=int, default=8, help='bits that the suggestion gives')
    args = parser.parse_args(argv)

    def run():
        cfg = _read_config(args)
        from .rank import rank
        with _damage_told(cfg), _safe(cfg):
            _make_work_dir(cfg)
            rank(cfg, args.level, args.by == 'ap', args.images, args.bits)

    return _guarded('sensitivity.py', run, args)
