"""Checks that speak: named warnings, each with what was found and what to do about it.

A check is a function of the report and of `Limits` that yields (found, advice), one a place.
They read only what report.json holds, so a report can be checked again from the file alone.
"""
from dataclasses import dataclass, fields
from statistics import median

from ..errors import UsageError, check_keys, is_number

SHOWN = 3  # places named by a check; the rest is counted


@dataclass(frozen=True)
class Limits:
    """From where on a check speaks. Set by hand; docs/report.md has what they say of real runs.

    Args:
        early_db (float): least SQNR (dB) of the first quarter of the backbone.
        jump_db (float): what one leaf may take off the SQNR ...
        drop_db (float): ... where the SQNR behind it is below this.
        end_db (float): least SQNR behind the backbone where the error has grown all the way.
        layer_db (float): local SQNR of a layer that is suspicious ...
        layer_below (float): ... where it is so far below the median of its kind.
        entropy_lost (float): share of a head's entropy that may go ...
        entropy_shift (float): ... and least change that counts.
        range_factor (float): ratio of the widths of an activation's range.
        clipped (float): share of values beyond a grid.
        class_lost (float): share of its AP that a class may lose ...
        class_least (float): ... where its AP was at least this.
        few_images (int): least number of calibration images.

    Example:
        >>> Limits.build(dict(few_images=64)).few_images
        64
    """

    early_db: float = 8.0
    jump_db: float = 6.0
    drop_db: float = 12.0
    end_db: float = 6.0
    layer_db: float = 8.0
    layer_below: float = 8.0
    entropy_lost: float = 0.5
    entropy_shift: float = 0.15
    range_factor: float = 1.6
    clipped: float = 0.05
    class_lost: float = 0.3
    class_least: float = 0.05
    few_images: int = 32

    @classmethod
    def build(cls, given=None, key='checks'):
        """From a dict of some of them; UsageError for an unknown name or no number."""
        if given is not None and not isinstance(given, dict):
            raise UsageError(f'{key}={given!r} is no dict')
        check_keys(given or {}, [field.name for field in fields(cls)], key)
        for name, value in (given or {}).items():
            if not is_number(value):
                raise UsageError(f'{key}.{name}={value!r} is not a number')
        return cls(**(given or {}))


CHECKS = {}  # name -> function


def check(name):
    """Decorator: `function(report, limits)` yields (found, advice) pairs, worst first."""

    def add(function):
        CHECKS[name] = function
        return function

    return add


def run_checks(report, limits=None):
    """All checks on the contents of a report.

    Args:
        report (dict): see `build_report`, with `diagnostics`; keys may be missing.
        limits (Limits | None): None has the defaults.

    Returns:
        list[dict]: name, found, advice; at most `SHOWN` of a name, and how many more.
    """
    said, limits = [], limits or Limits()
    for name, function in CHECKS.items():
        pairs = list(function(report, limits))
        for found, advice in pairs[:SHOWN]:
            said.append(dict(name=name, found=found, advice=advice))
        if len(pairs) > SHOWN:
            said[-1]['found'] += f' (and {len(pairs) - SHOWN} more such places)'
    return said


def _backbone(report):
    return [p for p in report['diagnostics'].get('propagation') or ()
            if p['part'] == 'backbone' and p['kind'] == 'leaf']


@check('early-layers-low-sqnr')
def early_layers(report, limits):
    """The first quarter of the backbone loses much already: nothing behind can repair it."""
    points = _backbone(report)
    early = [p for p in points[:max(2, len(points) // 4)]
             if p['quantized'] is not None and p['quantized'] < limits.early_db]
    if early:
        worst = min(early, key=lambda p: p['quantized'])
        source = _noisiest(points[:points.index(worst) + 1])
        yield (f"{_full(worst)} leaves with {worst['quantized']:.1f} dB, early in the backbone "
               f'({limits.early_db:g} dB or more is usual); most of the error comes from '
               f'{_full(source)}', _relief(report, _full(source)))


@check('attention-entropy-collapsed')
def collapsed_entropy(report, limits):
    """A head that looked around looks at one key, or at all alike."""
    heads, kept = [], 1 - limits.entropy_lost
    for head in report['diagnostics'].get('attention') or ():
        before, after = head['float_entropy'], head['entropy']
        if before is None or after is None or abs(before - after) < limits.entropy_shift:
            continue
        if after < kept * before or (1 - after) < kept * (1 - before):
            heads.append(head)
    for head in sorted(heads, key=lambda h: -abs(h['entropy'] - h['float_entropy'])):
        yield (f"{head['name']} head {head['head']}: attention entropy goes from "
               f"{head['float_entropy']:.2f} to {head['entropy']:.2f}",
               f"more bits for its matmuls: model.quant.overrides=[dict(pattern='{head['name']}"
               ".matmul_*', activation_bits=8)]; or another model.quant.softmax.kind")


@check('activation-range-shifted')
def range_shift(report, limits):
    """The input of a layer covers another range than in the float model."""
    shifted = []
    for entry in report['diagnostics'].get('activations') or ():
        if entry['role'] not in ('post-LN', 'post-GELU'):
            continue
        before = _width(entry['float_low'], entry['float_high'])
        after = _width(entry['low'], entry['high'])
        if before is None or after is None or before == after == 0:
            continue
        ratio = after / before if before else float('inf')
        if ratio > limits.range_factor or ratio * limits.range_factor < 1:
            shifted.append((max(ratio, 1 / ratio if ratio else float('inf')), entry))
    for _, entry in sorted(shifted, key=lambda pair: -pair[0]):
        layer = entry['name'].removesuffix('.input_quantizer')
        yield (f"{layer}: its input ({entry['role']}) spans {entry['float_low']:.3g} to "
               f"{entry['float_high']:.3g} in the float model, {entry['low']:.3g} to "
               f"{entry['high']:.3g} in the quantized one",
               'look at the units before it (section Reconstruction); lower '
               'quantize_cfg.reconstruction.weight_lr or scale_lr, or give the layer more bits: '
               f"model.quant.overrides=[dict(pattern='{layer}', activation_bits=8)]")


@check('activations-clipped')
def clipped(report, limits):
    """Much of an activation lies beyond its grid."""
    entries = [e for e in report['diagnostics'].get('activations') or ()
               if e['clipped'] is not None and e['clipped'] > limits.clipped]
    for entry in sorted(entries, key=lambda e: -e['clipped']):
        yield (f"{entry['name']}: {100 * entry['clipped']:.0f}% of the values are clipped",
               'search scales on more images (quantize_cfg.calibration.search_images), lower '
               'quantize_cfg.reconstruction.scale_lr, or exclude the layer')


@check('layer-far-below-its-kind')
def weak_layers(report, limits):
    """One layer adds much more error by itself than others of its kind."""
    entries = [e for e in report['diagnostics'].get('layers') or () if e['sqnr_db'] is not None]
    weak = []
    for entry in entries:
        # Linear layers and matmuls of one number of bits are not alike; their names' ends are
        alike = [e['sqnr_db'] for e in entries if _kind(e) == _kind(entry)]
        usual = median(alike) if len(alike) > 2 else median(e['sqnr_db'] for e in entries)
        if entry['sqnr_db'] < min(limits.layer_db, usual - limits.layer_below):
            weak.append((usual - entry['sqnr_db'], usual, entry))
    for _, usual, entry in sorted(weak, key=lambda w: -w[0]):
        bits = f"W{entry['weight_bits'] or '-'}A{entry['activation_bits']}"
        yield (f"{entry['name']} ({bits}) has a local SQNR of {entry['sqnr_db']:.1f} dB, layers "
               f'like it {usual:.1f} dB', _relief(report, entry['name']))


@check('error-grows')
def error_grows(report, limits):
    """The error jumps at a leaf that adds much of it, or grows from block to block."""
    points = [p for p in _backbone(report) if p['quantized'] is not None]
    jumps = []
    for before, after in zip(points, points[1:]):
        lost = before['quantized'] - after['quantized']
        if (lost > limits.jump_db and after['quantized'] < limits.drop_db
                and _adds_much(report, after)):
            jumps.append((lost, before, after))
    for _, before, after in sorted(jumps, key=lambda jump: -jump[0]):
        yield (f"SQNR falls from {before['quantized']:.1f} dB to {after['quantized']:.1f} dB at "
               f'{_full(after)}', _relief(report, _full(after)))
    values = list({p['block']: p['quantized'] for p in points if p['block'] is not None}.values())
    if points and points[-1]['block'] is None:
        values.append(points[-1]['quantized'])  # what the blocks feed, such as a classifier
    falls = sum(b < a for a, b in zip(values, values[1:]))
    # a jump into the first block, from a stem with more bits, is no step between blocks
    between = [jump for jump in jumps if jump[1]['block'] is not None]
    if (not between and len(values) >= 4 and values[-1] < limits.end_db
            and falls >= 0.75 * (len(values) - 1)):
        yield (f'SQNR falls in {falls} of {len(values) - 1} steps from block to block, from '
               f'{values[0]:.1f} dB to {values[-1]:.1f} dB',
               'no single layer is to blame: more activation bits '
               '(model.quant.activation_bits), more calibration images '
               '(quantize_cfg.calibration.images), or more iterations '
               '(quantize_cfg.reconstruction.iters)')


@check('units-all-restored')
def all_restored(report, limits):
    """Learning never helped: everything of a part and level was undone."""
    groups = {}
    for unit in report.get('units') or ():
        groups.setdefault((unit['chain'], unit['level'], unit['pos_stage']), []).append(unit)
    bad = {key: found for key, found in groups.items() if not any(u['accepted'] for u in found)}
    named = [f"{len(found)} of level {level!r} in {chain} (POS stage {stage})"
             for (chain, level, stage), found in bad.items() if len(found) > 1]
    parts = {}
    for unit in report.get('units') or ():
        parts.setdefault(unit['chain'], []).append(unit)
    named = [f'all {len(found)} of {chain}' for chain, found in parts.items()
             if not any(u['accepted'] for u in found)] or named
    if named:
        yield (f"units were restored because their held-out loss did not fall: "
               f"{', '.join(named[:4])}",
               'lower the rates (quantize_cfg.reconstruction.weight_lr, scale_lr), calibrate on '
               'more images (quantize_cfg.calibration.images), or leave the level out '
               '(quantize_cfg.levels)')


@check('class-lost-most-of-its-ap')
def lost_classes(report, limits):
    """The average hides a class that is gone."""
    by_class = report.get('classes') or {}
    losers = []
    for metric, kind in (('bbox', 'box'), ('segm', 'mask')):
        start = by_class.get('float', {}).get(metric, {})
        for name, value in by_class.get('quantized', {}).get(metric, {}).items():
            before = start.get(name)
            if before and value is not None and before >= limits.class_least:
                share = 1 - value / before
                if share > limits.class_lost:
                    losers.append((share, name, kind, before, value))
    for share, name, kind, before, value in sorted(losers, reverse=True):
        yield (f'class {name!r} lost {100 * share:.0f}% of its {kind} AP: {100 * before:.1f} to '
               f'{100 * value:.1f}',
               'see whether calibration images hold the class (quantize_cfg.calibration.images, '
               'calibration.dataset), and section Detections; more bits for the RoI heads: '
               "model.quant.overrides=[dict(pattern='roi_head.*', weight_bits=8, "
               'activation_bits=8)]')


@check('few-calibration-images')
def few_images(report, limits):
    """Scales and roundings are learned by heart."""
    images = (report.get('calibration') or {}).get('images')
    if images is not None and images < limits.few_images:
        yield (f'only {images} images calibrate',
               f'take {limits.few_images} or more, better 256: quantize_cfg.calibration.images')


def _full(point):
    return f"{point['part']}.{point['name']}"


def _noise(db):
    """Error power over signal power."""
    return 0.0 if db is None else 10**(-db / 10)


def _noisiest(points):
    """The point at which the error grows most."""
    before = [0.0, *(_noise(p['quantized']) for p in points)]
    return max(zip(before, points), key=lambda pair: _noise(pair[1]['quantized']) - pair[0])[1]


def _inside(report, place):
    """Measured layers of a leaf, or the one layer of that name."""
    return [e for e in report['diagnostics'].get('layers') or () if e['sqnr_db'] is not None
            and f"{e['name']}.".startswith(f'{place}.')]


def _adds_much(report, point):
    """Whether a leaf's own layers explain half of the error behind it.

    Where they do not it came in, and only shows here: a few huge values may carry the power of
    a residual stream, and a norm behind it scales them down (ViT's last one does).
    """
    own = sum(_noise(e['sqnr_db']) for e in _inside(report, _full(point)))
    return not own or own >= 0.5 * _noise(point['quantized'])


def _relief(report, place):
    """What to do about a noisy leaf or layer: more bits, or float where it has 8 already."""
    inside = _inside(report, place)
    weights = not inside or any(e['weight_bits'] for e in inside)
    pattern = place if [e['name'] for e in inside] == [place] else f'{place}*'
    more = (f"more bits, model.quant.overrides=[dict(pattern='{pattern}', "
            f"{'weight_bits=8, ' if weights else ''}activation_bits=8)]")
    if not inside:
        return more
    worst = min(inside, key=lambda e: e['sqnr_db'])['name']
    float_ = f"leave {worst} float, model.quant.exclude=['{worst}']"
    least = min(e[k] for e in inside for k in ('weight_bits', 'activation_bits') if e[k])
    return float_ if least >= 8 else f'{more}, or {float_}'


def _width(low, high):
    return None if low is None or high is None else high - low


def _kind(entry):
    """Layers that do the same in other blocks: the name without its numbers."""
    return tuple(part for part in entry['name'].split('.') if not part.isdigit())[-3:]
