"""Checks that speak: named warnings, each with what was found and what to do about it.

A check is a function of the report that yields (found, advice), one a place. They read
only what report.json holds, so a report can be checked again from the file alone.
"""
from statistics import median

EARLY_DB = 8.0  # least SQNR of the first quarter of the backbone
JUMP_DB = 6.0  # what one leaf may take off the SQNR
END_DB = 6.0  # least SQNR behind the backbone where the error has grown all the way
DROP_DB = 12.0  # where a jump counts: SQNR behind it below this
LAYER_DB = 8.0  # local SQNR of a layer that is suspicious ...
LAYER_BELOW = 8.0  # ... where it is so far below the median of its kind
ENTROPY_LOST = 0.5  # share of a head's entropy that may go
ENTROPY_SHIFT = 0.15  # and least change that counts
RANGE_FACTOR = 1.6  # ratio of the widths of an activation's range
CLIPPED = 0.05  # share of values beyond a grid
CLASS_LOST = 0.3  # share of its AP that a class may lose
CLASS_LEAST = 0.05  # AP of a class that is worth looking at
FEW_IMAGES = 32
SHOWN = 3  # places named by a check; the rest is counted

CHECKS = {}  # name -> function


def check(name):
    """Decorator: `function(report)` yields (found, advice) pairs, worst first."""

    def add(function):
        CHECKS[name] = function
        return function

    return add


def run_checks(report):
    """All checks on the contents of a report.

    Args:
        report (dict): see `build_report`, with `diagnostics`; keys may be missing.

    Returns:
        list[dict]: name, found, advice; at most `SHOWN` of a name, and how many more.
    """
    said = []
    for name, function in CHECKS.items():
        pairs = list(function(report))
        for found, advice in pairs[:SHOWN]:
            said.append(dict(name=name, found=found, advice=advice))
        if len(pairs) > SHOWN:
            said[-1]['found'] += f' (and {len(pairs) - SHOWN} more such places)'
    return said


def _backbone(report):
    return [p for p in report['diagnostics'].get('propagation') or ()
            if p['part'] == 'backbone' and p['kind'] == 'leaf']


@check('early-layers-low-sqnr')
def early_layers(report):
    """The first quarter of the backbone loses much already: nothing behind can repair it."""
    points = _backbone(report)
    early = [p for p in points[:max(2, len(points) // 4)]
             if p['quantized'] is not None and p['quantized'] < EARLY_DB]
    if early:
        worst = min(early, key=lambda p: p['quantized'])
        name = f"{worst['part']}.{worst['name']}"
        yield (f"{name} leaves with {worst['quantized']:.1f} dB, early in the backbone "
               f'({EARLY_DB:.0f} dB or more is usual)',
               f"give it more bits: model.quant.overrides=[dict(pattern='{name}*', weight_bits=8, "
               'activation_bits=8)]')


@check('attention-entropy-collapsed')
def collapsed_entropy(report):
    """A head that looked around looks at one key, or at all alike."""
    heads = []
    for head in report['diagnostics'].get('attention') or ():
        before, after = head['float_entropy'], head['entropy']
        if before is None or after is None or abs(before - after) < ENTROPY_SHIFT:
            continue
        if after < (1 - ENTROPY_LOST) * before or (1 - after) < (1 - ENTROPY_LOST) * (1 - before):
            heads.append(head)
    for head in sorted(heads, key=lambda h: -abs(h['entropy'] - h['float_entropy'])):
        yield (f"{head['name']} head {head['head']}: attention entropy goes from "
               f"{head['float_entropy']:.2f} to {head['entropy']:.2f}",
               f"more bits for its matmuls: model.quant.overrides=[dict(pattern='{head['name']}"
               ".matmul_*', activation_bits=8)]; or another model.quant.softmax.kind")


@check('activation-range-shifted')
def range_shift(report):
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
        if ratio > RANGE_FACTOR or ratio < 1 / RANGE_FACTOR:
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
def clipped(report):
    """Much of an activation lies beyond its grid."""
    entries = [e for e in report['diagnostics'].get('activations') or ()
               if e['clipped'] is not None and e['clipped'] > CLIPPED]
    for entry in sorted(entries, key=lambda e: -e['clipped']):
        yield (f"{entry['name']}: {100 * entry['clipped']:.0f}% of the values are clipped",
               'calibrate on more or other images (quantize_cfg.calibration.images), lower '
               'quantize_cfg.reconstruction.scale_lr, or exclude the layer')


@check('layer-far-below-its-kind')
def weak_layers(report):
    """One layer adds much more error by itself than others of its kind."""
    entries = [e for e in report['diagnostics'].get('layers') or () if e['sqnr_db'] is not None]
    weak = []
    for entry in entries:
        # Linear layers and matmuls of one number of bits are not alike; their names' ends are
        alike = [e['sqnr_db'] for e in entries if _kind(e) == _kind(entry)]
        usual = median(alike) if len(alike) > 2 else median(e['sqnr_db'] for e in entries)
        if entry['sqnr_db'] < min(LAYER_DB, usual - LAYER_BELOW):
            weak.append((usual - entry['sqnr_db'], usual, entry))
    for _, usual, entry in sorted(weak, key=lambda w: -w[0]):
        bits = f"W{entry['weight_bits'] or '-'}A{entry['activation_bits']}"
        yield (f"{entry['name']} ({bits}) has a local SQNR of {entry['sqnr_db']:.1f} dB, layers "
               f'like it {usual:.1f} dB',
               f"more bits, model.quant.overrides=[dict(pattern='{entry['name']}', "
               f"{'weight_bits=8, ' if entry['weight_bits'] else ''}activation_bits=8)], or leave "
               f"it float, model.quant.exclude=['{entry['name']}']")


@check('error-grows')
def error_grows(report):
    """The error grows from block to block, or jumps at one."""
    points = [p for p in _backbone(report) if p['quantized'] is not None]
    jumps = []
    for before, after in zip(points, points[1:]):
        lost = before['quantized'] - after['quantized']
        if lost > JUMP_DB and after['quantized'] < DROP_DB:
            jumps.append((lost, before, after))
    for _, before, after in sorted(jumps, key=lambda jump: -jump[0]):
        name = f"{after['part']}.{after['name']}"
        yield (f"SQNR falls from {before['quantized']:.1f} dB to {after['quantized']:.1f} dB at "
               f'{name}',
               f'look at the layers of {name} in section Every layer; give them more bits with '
               f"model.quant.overrides=[dict(pattern='{name}*', weight_bits=8, "
               'activation_bits=8)]')
    blocks = {p['block']: p['quantized'] for p in points if p['block'] is not None}
    values = list(blocks.values())
    falls = sum(b < a for a, b in zip(values, values[1:]))
    if (not jumps and len(values) >= 4 and values[-1] < END_DB
            and falls >= 0.75 * (len(values) - 1)):
        yield (f'SQNR falls in {falls} of {len(values) - 1} steps from block to block, from '
               f'{values[0]:.1f} dB to {values[-1]:.1f} dB',
               "reconstruct coarser units too (quantize_cfg.levels with 'stage' and 'backbone'), "
               'with more iterations (quantize_cfg.reconstruction.iters), or more activation bits')


@check('units-all-restored')
def all_restored(report):
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
def lost_classes(report):
    """The average hides a class that is gone."""
    by_class = report.get('classes') or {}
    losers = []
    for metric, kind in (('bbox', 'box'), ('segm', 'mask')):
        start = by_class.get('float', {}).get(metric, {})
        for name, value in by_class.get('quantized', {}).get(metric, {}).items():
            before = start.get(name)
            if before and value is not None and before >= CLASS_LEAST:
                share = 1 - value / before
                if share > CLASS_LOST:
                    losers.append((share, name, kind, before, value))
    for share, name, kind, before, value in sorted(losers, reverse=True):
        yield (f'class {name!r} lost {100 * share:.0f}% of its {kind} AP: {100 * before:.1f} to '
               f'{100 * value:.1f}',
               'see whether calibration images hold the class (quantize_cfg.calibration.images, '
               'calibration.dataset), and section Detections; more bits for the predictors: '
               "model.quant.overrides=[dict(pattern='*fc_cls', weight_bits=8, "
               'activation_bits=8)]')


@check('few-calibration-images')
def few_images(report):
    """Scales and roundings are learned by heart."""
    images = (report.get('calibration') or {}).get('images')
    if images is not None and images < FEW_IMAGES:
        yield (f'only {images} images calibrate',
               f'take {FEW_IMAGES} or more, better 256: quantize_cfg.calibration.images')


def _width(low, high):
    return None if low is None or high is None else high - low


def _kind(entry):
    """Layers that do the same in other blocks: the name without its numbers."""
    return tuple(part for part in entry['name'].split('.') if not part.isdigit())[-3:]
