"""The command line of tools/report.py."""
import os

from ..cli import _damage_told, _guarded, _parser, _read_config, _safe


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
