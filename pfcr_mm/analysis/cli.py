"""The command lines of tools/report.py and tools/sensitivity.py."""
import os

from ..cli import damage_told, guarded, make_parser, make_work_dir, read_config, safe_loading


def report_main(argv=None):
    """tools/report.py. Returns the exit code: 0, or 2 for a mistake of the user's."""
    parser = make_parser('Write report.html for a quantized checkpoint.', 'report.py')
    parser.add_argument('quantized', help='checkpoint written by tools/quant.py')
    parser.add_argument('--float', dest='checkpoint', metavar='PATH',
                        help='float checkpoint (default: load_from)')
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir or os.path.dirname(args.quantized) or '.'

    def run():
        cfg = read_config(args)
        from .page import PAGE
        from .report import check_lines, report_checkpoint
        with damage_told(cfg), safe_loading(cfg):
            checks = report_checkpoint(cfg, args.quantized, args.work_dir)
        for line in check_lines(checks):
            print(f'warning: {line}')
        print(f'Wrote {os.path.join(args.work_dir, PAGE)}')

    return guarded('report.py', run, args)


def sensitivity_main(argv=None):
    """tools/sensitivity.py. Returns the exit code: 0, or 2 for a mistake of the user's."""
    parser = make_parser('Quantize one layer or unit at a time and rank them.', 'sensitivity.py')
    parser.add_argument('checkpoint', nargs='?', help='float checkpoint (default: load_from)')
    parser.add_argument('--level', default='layer',
                        help="'layer', or a level of units such as leaf, block, stage")
    parser.add_argument('--by', choices=['error', 'ap'], default='error',
                        help='error of the outputs, or AP on the images (slow)')
    parser.add_argument('--images', type=int, help='of the test split (default: 4; AP: 50)')
    parser.add_argument('--bits', type=int, default=8, help='bits that the suggestion gives')
    args = parser.parse_args(argv)

    def run():
        cfg = read_config(args)
        from .rank import rank
        with damage_told(cfg), safe_loading(cfg):
            make_work_dir(cfg)
            rank(cfg, args.level, args.by == 'ap', args.images, args.bits)

    return guarded('sensitivity.py', run, args)
