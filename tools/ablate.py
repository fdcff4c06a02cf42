"""Run a grid of variants of one config, and write a CSV and a plot.

    python tools/ablate.py CONFIG --grid units*pos loss rounding softmax zero_point \
        --seeds 0 1 2 --total-iters 4000 --out results/ablation.csv
    python tools/ablate.py CONFIG --grid method*bits --seeds 0 1 2 --out results/methods.csv

A word of --grid is a product of axes; all other axes stay as the config has them. An axis
may name its values: `pos=off,quantizer`. Axes and values:

    method      files in configs/_base_/methods/
    bits        w6a6 w4a4 w3a3
    units       leaf, block, leaf..block, leaf..pair, and so on up to the config's coarsest
    pos         off, quantizer (R1), unit (R2), operand (R3)
    loss        channel_mse, norm_mse (as a LayerNorm sees it), mse, aph (Hessian-weighted),
                mse_final (MSE and global)
    rounding    latent, adaround
    softmax     log2, log_sqrt2, adalog, uniform
    gelu        adalog, uniform (quantizer of what comes from a GELU)
    values      balanced, plain (attention's values against the output projection)
    heads       turned, plain (queries, keys and values within a head)
    means       centred, plain (keys and values)
    tokens      own, shared (quantizers of class tokens; needs a classifier that has them)
    padding     moved, zero (as published code has it; needs windows that are padded)
    zero_point  integer, fractional (as published code has it)
    traversal   post_order, level_order

With --total-iters all cells that learn have as many iterations in all. Each run is a
process of its own in the work dir; one whose report is there is not repeated, unless its
config has changed. Runs that differ only in what follows calibration share it, to the same
result; each counts its seconds. A run that fails is told in one line and the others go on.
--no-run only collects, --list only says what would be run.

Columns of the CSV: config, the axes, seed, metrics of the quantized, the float and the
calibrated model (0 to 1); of classifiers what `AgreementHook` measures of the quantized and
the calibrated one: divergence from the float model (kl) and the share of images given the
same class (same); iterations, seconds. Rows of other cells that it holds stay, and those of
other iterations. The plot shows the cells of this call.
"""
import argparse
import functools
import itertools
import sys
from pathlib import Path

from run_matrix import read_csv, report_of, write_csv

from pfcr_mm.cli import quant_config
from pfcr_mm.engine.fingerprint import with_quant_defaults
from pfcr_mm.engine.metrics import agreements, titles
from pfcr_mm.errors import UsageError

METHODS = Path(__file__).parents[1] / 'configs' / '_base_' / 'methods'
GRID = ('units*pos', 'loss', 'rounding', 'softmax', 'gelu', 'values', 'heads', 'means', 'padding',
        'zero_point')
STATES = (('', 'quantized'), ('float_', 'float'), ('calibrated_', 'calibrated'))


class Axis:
    """One thing that varies.

    Args:
        key (str): dotted key of the config.
        values (dict | list): config value by name; of a list, each is its own name.
    """

    def __init__(self, key, values):
        self.key = key
        self.choices = values if isinstance(values, dict) else {v: v for v in values}

    def values(self, cfg):
        """Names of all values."""
        return list(self.choices)

    def arguments(self, cfg, value):
        """(cfg-options, other arguments) that set it."""
        return [f'{self.key}={_text(self.choices[value])}'], []

    def read(self, cfg):
        """The value that a config has."""
        found = _get(cfg, self.key)
        if isinstance(found, dict):
            return found['type']
        return next((name for name, v in self.choices.items() if v == found), _text(found))


class Units(Axis):
    """Which levels are reconstructed."""

    def __init__(self):
        super().__init__('quantize_cfg.levels', [])

    def values(self, cfg):
        levels = list(_get(cfg, self.key))
        runs = [f'{levels[0]}..{level}' for level in levels[1:]]
        return [*levels[:2], *runs]

    def arguments(self, cfg, value):
        levels = list(_get(cfg, self.key))
        first, _, last = value.partition('..')
        picked = levels[levels.index(first):levels.index(last or first) + 1]
        return [f'{self.key}=[{",".join(picked)}]'], []

    def read(self, cfg):
        levels = list(_get(cfg, self.key))
        return '..'.join(dict.fromkeys([levels[0], levels[-1]])) if levels else 'none'


class Bits(Axis):
    """Bits of weights and activations."""

    def __init__(self):
        super().__init__('model.quant.weight_bits', ['w6a6', 'w4a4', 'w3a3'])

    def arguments(self, cfg, value):
        weight, activation = value[1:].split('a')
        return [f'model.quant.weight_bits={weight}',
                f'model.quant.activation_bits={activation}'], []

    def read(self, cfg):
        return f'w{cfg.model.quant.weight_bits}a{cfg.model.quant.activation_bits}'


class Method(Axis):
    """A file of configs/_base_/methods/."""

    def __init__(self):
        super().__init__('', sorted(path.stem for path in METHODS.glob('*.py')))

    def arguments(self, cfg, value):
        return [], ['--method', str(METHODS / f'{value}.py')]

    def read(self, cfg):
        return 'as configured'


AXES = dict(
    method=Method(), bits=Bits(), units=Units(),
    pos=Axis('quantize_cfg.pos.mode', ['off', 'quantizer', 'unit', 'operand']),
    loss=Axis('quantize_cfg.reconstruction.loss',
              ['channel_mse', 'norm_mse', 'mse', 'aph', 'mse_final']),
    rounding=Axis('model.quant.rounding', ['latent', 'adaround']),
    softmax=Axis('model.quant.softmax.kind', ['log2', 'log_sqrt2', 'adalog', 'uniform']),
    gelu=Axis('model.quant.post_gelu.kind', ['adalog', 'uniform']),
    values=Axis('model.quant.balance_values', dict(balanced=True, plain=False)),
    heads=Axis('model.quant.rotate_heads', dict(turned=True, plain=False)),
    means=Axis('model.quant.centre_heads', dict(centred=True, plain=False)),
    queries=Axis('model.quant.centre_queries', dict(centred=True, plain=False)),
    tokens=Axis('model.quant.class_tokens', ['own', 'shared']),
    padding=Axis('model.quant.move_padding', dict(moved=True, zero=False)),
    zero_point=Axis('model.quant.integer_zero_point', dict(integer=True, fractional=False)),
    traversal=Axis('quantize_cfg.traversal', ['post_order', 'level_order']))
# What configs leave to the code, beside `model.quant`.
DEFAULTS = {'quantize_cfg.reconstruction.loss': 'channel_mse'}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config that the cells are variants of')
    parser.add_argument('--grid', nargs='+', default=GRID, metavar='AXIS[*AXIS]')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--total-iters', type=int, help='iterations of every cell that learns')
    parser.add_argument('--out', required=True, help='CSV to write; the plot lies beside it')
    parser.add_argument('--work-dir', default='work_dirs/ablate', help='folder of the runs')
    parser.add_argument('--no-run', action='store_true', help='collect the reports that are there')
    parser.add_argument('--list', action='store_true', help='list the runs and stop')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='passed on to quant.py')
    args = parser.parse_args(argv)
    try:
        groups = grid(args)
    except UsageError as error:
        print(f'ablate.py: error: {error}', file=sys.stderr)
        return 2
    cells = dict.fromkeys(cell for group in groups.values() for cell in group)
    if args.list:
        print('\n'.join(f'{label(cell)} seed {seed}' for cell in cells for seed in args.seeds))
        return 0
    found, failed = collect(args, cells)
    rows = [r for r in read_csv(Path(args.out)) if r['config'] == Path(args.config).stem]
    if rows:
        print('\n'.join(table(rows)))
    plot(args, groups, found)
    if failed:
        print(f'ablate: {failed} of {len(cells) * len(args.seeds)} runs failed', file=sys.stderr)
    return 1 if failed else 0


def grid(args):
    """Cells of each word of --grid, as tuples of (axis, value) pairs.

    Returns:
        dict[str, list[tuple]]: by word; the first cell in which nothing varies is not
        repeated in each.
    """
    @functools.cache
    def base(bits):  # what is left to the code depends on bits
        options = [*args.cfg_options, *(AXES['bits'].arguments(None, bits)[0] if bits else [])]
        return resolved([args.config, *(['--cfg-options', *options] if options else [])])

    def varied(name, value, cell):
        cfg = base(None if name == 'bits' else dict(cell).get('bits'))
        return AXES[name].read(cfg) != value

    cfg, groups = base(None), {}
    for word in args.grid:
        parts = [part.partition('=') for part in word.split('*')]
        choices = []
        for name, _, given in parts:
            if name not in AXES:
                raise UsageError(f'--grid: {name!r} is no axis; choose of {list(AXES)}')
            known = AXES[name].values(cfg)
            values = given.split(',') if given else known
            for value in values:
                if value not in known:
                    raise UsageError(f'--grid: {name} has no value {value!r}; choose of {known}')
            choices.append([(name, value) for value in values])
        groups[word] = [
            tuple((n, v) for n, v in cell if varied(n, v, cell))
            for cell in itertools.product(*choices)]
    return groups


def resolved(arguments):
    """The config that tools/quant.py runs, with what its `model.quant` leaves to the code."""
    cfg = quant_config(arguments)
    cfg.model = with_quant_defaults(cfg.model)
    return cfg


def collect(args, cells):
    """Run what is missing, and write all rows.

    A row of the same cell and seed stays beside a new one of other iterations: it is another
    measurement.

    Returns:
        tuple[dict, int]: rows by cell, of this call; how many runs failed.
    """
    out, stem, failed = Path(args.out), Path(args.config).stem, 0
    rows, found = read_csv(out), {}
    for cell, seed in itertools.product(cells, args.seeds):
        name = f'{label(cell)} seed {seed}'
        folder = Path(args.work_dir) / stem / f'{label(cell)}_seed{seed}'
        arguments = [args.config, '--work-dir', str(folder), *arguments_of(args, cell, seed)]
        report, ok = report_of(name, folder, arguments, args.no_run, 'ablate')
        failed += not ok
        if report is None:
            continue
        new = row(stem, described(resolved(arguments), cell), report)
        found.setdefault(cell, []).append(new)
        same = ('config', *AXES, 'seed', 'iterations')
        rows = [r for r in rows if any(str(r.get(k)) != str(new[k]) for k in same)] + [new]
        write_csv(rows, out, dict.fromkeys(key for r in rows for key in r))
    return found, failed


def arguments_of(args, cell, seed):
    """Arguments of tools/quant.py that make one cell, beside config and work dir."""
    base = quant_config([args.config])
    options, more = [f'randomness.seed={seed}'], []
    # cells that calibrate alike do so once
    options.append(f"quantize_cfg.calibration_dir='{Path(args.work_dir) / 'calibrations'}'")
    if args.total_iters:
        options.append(f'quantize_cfg.total_iters={args.total_iters}')
    for name, value in cell:
        own, other = AXES[name].arguments(base, value)
        options, more = options + own, more + other
    return ['--cfg-options', *options, *args.cfg_options, *more]


def described(cfg, cell):
    """The value of every axis in a cell."""
    return {name: dict(cell).get(name, axis.read(cfg)) for name, axis in AXES.items()}


def label(cell):
    """Name of a cell, also of its folder."""
    return '_'.join(f'{name}-{value}' for name, value in cell) or 'base'


def row(stem, values, report):
    """One CSV row."""
    family = titles(*(report[state] for _, state in STATES))
    return dict(
        config=stem, **values, seed=report['seed'],
        **{f'{prefix}{metric}': (report[state] or {}).get(metric)
           for prefix, state in STATES for metric in family},
        **{f'{prefix}{name}': value for prefix, state in STATES if state != 'float'
           for name, value in agreements(report).get(state, {}).items()},
        iterations=sum(unit['iters'] for unit in report['units']),
        seconds=round(report['seconds']))


def table(rows):
    """A Markdown table, a line a cell and number of iterations: mean and range, in percent.

    Args:
        rows (list[dict]): of one config, as the CSV has them.
    """
    rows = [{**dict.fromkeys(AXES, ''), **r} for r in rows]  # older ones may lack an axis
    varied = [name for name in AXES if len({r[name] for r in rows}) > 1] or ['bits']
    metric = main_metric(rows)
    lines = ['| ' + ' | '.join([*varied, 'seeds', 'iterations', metric, 'of float']) + ' |',
             '|' + '---|' * (len(varied) + 4)]
    for (*key, iterations), group in _grouped(rows, [*varied, 'iterations']).items():
        mean, low, high = spread([_number(r[metric]) for r in group])
        reference = [_number(r[f'float_{metric}']) for r in group]
        share = '-' if None in reference or not sum(reference) else (
            f'{mean * len(reference) / sum(reference):.1f}%')
        shown = f'{mean:.1f}' + (f' [{low:.1f}..{high:.1f}]' if high > low else '')
        lines.append(f"| {' | '.join(key)} | {len(group)} | {iterations} | {shown} | {share} |")
    return lines


def plot(args, groups, rows):
    """Draw a panel for each word of --grid: mean and range over seeds, float and calibrated.

    Args:
        args (argparse.Namespace): of the command line.
        groups (dict): see `grid`.
        rows (dict): by cell, see `collect`.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    panels = {word: [rows[cell] for cell in cells if cell in rows]
              for word, cells in groups.items()}
    panels = {word: found for word, found in panels.items() if found}
    if not panels:
        return
    metric = main_metric(next(iter(rows.values())))
    title = titles({metric: 0})[metric]
    heights = [len(found) for found in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, squeeze=False, sharex=True, constrained_layout=True,
        figsize=(7, 0.8 + 0.28 * sum(heights) + 0.5 * len(panels)), height_ratios=heights)
    for (word, found), axis in zip(panels.items(), axes[:, 0]):
        names = [part.partition('=')[0] for part in word.split('*')]
        means, lows, highs = zip(*(spread([_number(r[metric]) for r in group])
                                   for group in found))
        errors = [[m - low for m, low in zip(means, lows)],
                  [high - m for m, high in zip(means, highs)]]
        axis.errorbar(means, range(len(found)), xerr=errors, fmt='o', color='black', capsize=3)
        axis.set_yticks(range(len(found)), [
            ', '.join(group[0][name] for name in names) for group in found])
        axis.invert_yaxis()
        axis.set_title(' x '.join(names), fontsize=10, loc='left')
        axis.grid(axis='x', alpha=0.3)
        for prefix, style in (('float_', '-'), ('calibrated_', ':')):
            values = [_number(r[f'{prefix}{metric}']) for group in found for r in group]
            if any(v is not None for v in values):
                axis.axvline(spread(values)[0], color='gray', linestyle=style,
                             label=prefix.strip('_'))
    axes[0, 0].legend(loc='best', fontsize=8)
    axes[-1, 0].set_xlabel(f'{title} (%), mean and range over seeds')
    path = Path(args.out).with_suffix('.png')
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f'ablate: wrote {args.out} and {path}')


def main_metric(rows):
    """The first metric of the family that the rows have."""
    return next(iter(titles({key: 0 for key in rows[0] if rows[0][key] not in ('', None)})))


def spread(values):
    """Mean, least and largest, in percent."""
    values = [100 * v for v in values if v is not None] or [0.0]
    return sum(values) / len(values), min(values), max(values)


def _grouped(rows, names):
    groups = {}
    for r in rows:
        groups.setdefault(tuple(r[name] for name in names), []).append(r)
    return groups


def _get(cfg, key):
    for part in key.split('.'):
        cfg = cfg.get(part) if cfg is not None else None
    return DEFAULTS.get(key) if cfg is None else cfg


def _number(text):
    return None if text in ('', None) else float(text)


def _text(value):
    return value if isinstance(value, str) else repr(value)


if __name__ == '__main__':
    sys.exit(main())
