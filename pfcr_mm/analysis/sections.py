"""Sections of a report: what each says of a run, in words, tables and figures."""
from dataclasses import dataclass, field
from statistics import median

from ..engine.method import labels
from ..engine.metrics import AGREEMENT, agreements, titles
from . import figures, signal_figures
from .gallery import gallery
from .tables import Table, brief, number, text

_STATES = ('float', 'calibrated', 'quantized')
_SIZES = (('', 'all'), ('_50', 'IoU 0.50'), ('_75', 'IoU 0.75'), ('_s', 'small'), ('_m', 'medium'),
          ('_l', 'large'))
_NO_RECORD = 'This checkpoint comes without the records of its run (report.json): '


@dataclass
class Section:
    """A part of the page.

    Args:
        id, title (str): of the heading.
        text (list[str]): how to read it.
        missing (list[str]): what is left out, and why.
        tables (list[Table]): tables.
        figures (list): (name, Figure, caption) each.
    """

    id: str
    title: str
    text: list = field(default_factory=list)
    missing: list = field(default_factory=list)
    tables: list = field(default_factory=list)
    figures: list = field(default_factory=list)

    def add(self, name, figure, caption=''):
        """Add a figure where there is one."""
        if figure is not None:
            self.figures.append((name, figure, caption))


def sections(report, material, curves):
    """All sections, in order.

    Args:
        report (dict): contents of report.json with `diagnostics`.
        material (Material): what figures draw beyond it.
        curves (list[dict]): lines of units.jsonl.

    Returns:
        list[Section]
    """
    found, names = report['diagnostics'], labels(report)
    return [results(report), reconstruction(report, curves), propagation(found, names),
            attention(found, material, names), activations(found, material, names), weights(found),
            detections(found, material), layers(report)]


def results(report):
    """AP (or accuracy) of each state, by size and class; sizes on disk; phases."""
    section = Section('result', 'Result')
    states, names = [s for s in _STATES if report.get(s)], labels(report)
    if not states:
        section.missing.append(f'{_NO_RECORD}AP and time are not known. tools/test.py measures '
                               'the AP of the quantized model.')
    metrics = {metric: title for metric, title in titles(*(report[s] for s in states)).items()
               if any(metric in report[s] for s in states)}
    size, agreement = report.get('size_mb') or {}, agreements(report)
    rows = []
    for state in states:
        cells = [text(names[state])]
        for metric in metrics:
            cells.append(number(report[state].get(metric), 1, 100))
            reference = (report.get('float') or {}).get(metric)
            share = report[state].get(metric, 0) / reference if reference else None
            cells.append(number(share, 1, 100))
        if agreement:
            found = agreement.get(state, {})
            cells += [number(found.get('kl'), 3), number(found.get('same'), 1, 100)]
        rows.append([*cells, number(size.get('float' if state == 'float' else 'quantized'), 2)])
    if rows:
        head = [c for title in metrics.values() for c in (title, '% of float')]
        caption = 'In percent; size in MB'
        if agreement:
            head += AGREEMENT.values()
            caption += ('; divergence of class probabilities from the float model in nats, images '
                        'given the same class')
        section.tables.append(Table('results', caption, ['', *head, 'size'], rows, open=True))
    _by_size(section, report, states, names)
    for metric, label in (('bbox', 'box'), ('segm', 'mask')):
        by_class = report.get('classes') or {}
        section.add(f'classes_{metric}', figures.classes(by_class, metric, names))
        _class_table(section, by_class, metric, label, names)
    if report.get('phases'):
        section.tables.append(Table(
            'phases', 'Time and peak memory by phase', ['phase', 'seconds', 'peak memory (MB)'],
            [[text(name), number(p['seconds'], 1), number(p['peak_memory_mb'], 0)]
             for name, p in report['phases'].items()], open=True))
    return section


def _by_size(section, report, states, names):
    measured = {}
    for state in states:
        for key, value in ((report.get('metrics') or {}).get(state) or {}).items():
            measured[state, key.rpartition('/')[2]] = value
    rows = []
    for metric, label in (('bbox_mAP', 'box'), ('segm_mAP', 'mask')):
        for end, name in _SIZES:
            values = [measured.get((s, f'{metric}{end}')) for s in states]
            if any(v is not None for v in values):
                rows.append([text(label), text(name), *(
                    number(None if v is None or v < 0 else v, 1, 100) for v in values)])
    if rows:
        section.tables.append(Table('sizes', 'AP by size of objects and overlap, in percent',
                                    ['', 'AP', *(names[s] for s in states)], rows, open=True))


def _class_table(section, by_class, metric, label, labels_):
    states = [s for s in _STATES if by_class.get(s, {}).get(metric)]
    if 'quantized' not in states:
        return
    final, start = by_class['quantized'][metric], by_class.get('float', {}).get(metric, {})

    def change(name):
        pair = final.get(name), start.get(name)
        return None if None in pair else pair[0] - pair[1]

    names = sorted(final, key=lambda n: (change(n) is None, change(n) or 0))
    section.tables.append(Table(
        f'classes-{metric}', f'{label} AP by class, in percent, those that lost most first',
        ['class', *(labels_[s] for s in states), f"{labels_['quantized']} minus float"],
        [[text(n), *(number(by_class[s][metric].get(n), 1, 100) for s in states),
          number(change(n), 1, 100)] for n in names]))


def reconstruction(report, curves):
    """Units: loss before and after, what was kept and what was undone."""
    section = Section('units', 'Reconstruction', [
        'Loss of each unit on the held-out calibration images before and after learning. A unit '
        'whose loss did not fall is restored to what it was.'])
    records = report.get('units')
    if records is None:
        section.missing.append(f'{_NO_RECORD}losses of units are not known.')
        return section
    if not records:
        section.missing.append('No unit was reconstructed: this run only calibrated.')
        return section
    groups = {}
    for record in records:
        groups.setdefault((record['pos_stage'], record['chain'], record['level']), []).append(
            record)
    rows = []
    for (stage, chain, level), found in groups.items():
        ratios = [r['loss_after'] / r['loss_before'] for r in found
                  if r['loss_before'] and r['loss_after'] is not None]
        rows.append([
            number(stage, 0), text(chain), text(level), number(len(found), 0),
            number(sum(r['accepted'] for r in found), 0),
            number(median(ratios) if ratios else None, 3),
            number(sum(r['seconds'] for r in found), 1)])
    section.tables.append(Table(
        'levels', 'By part and level', ['POS stage', 'part', 'level', 'units', 'accepted',
                                        'median loss after / before', 'seconds'], rows, open=True))
    section.add('units', figures.units(records))
    section.add('curves', figures.curves(curves))
    if curves and not any(name == 'curves' for name, *_ in section.figures):
        section.missing.append('Units learned for too few steps to draw loss curves.')
    if not curves:
        section.missing.append('There is no units.jsonl beside the checkpoint: loss curves are '
                               'left out.')
    section.tables.append(Table(
        'all-units', 'Every unit', ['POS stage', 'level', 'unit', 'loss before', 'loss after',
                                    'verdict', 'steps', 'seconds'],
        [[number(r['pos_stage'], 0), text(r['level']), text(r['name']),
          number(r['loss_before'], 5), number(r['loss_after'], 5),
          text('accepted' if r['accepted'] else 'restored'), number(r['iters'], 0),
          number(r['seconds'], 1)] for r in records]))
    return section


def propagation(found, names):
    """SQNR through the model."""
    section = Section('propagation', 'Error propagation', [
        'Signal-to-quantization-noise ratio (SQNR) of what leaves each leaf, each model fed with '
        'its own activations: 10 log10 of the power of the float signal over that of the error. '
        '20 dB is an error of a tenth of the signal, 0 dB an error as large as the signal. RoI '
        'features are cut at the same boxes in all models.'])
    points = found.get('propagation')
    if not points:
        section.missing.append('Left out: it needs the float checkpoint, images, and parts that '
                               'have a chain.')
        return section
    if all(p['calibrated'] is None for p in points):
        section.missing.append('There is no calibrated.pth of this run: the curve of the only '
                               'calibrated model is left out.')
    section.add('sqnr', signal_figures.propagation(points, names))
    section.tables.append(Table(
        'points', 'SQNR of every leaf, of the maps for the neck, of each output',
        ['part', 'output', 'kind', f"{names['calibrated']} (dB)", f"{names['quantized']} (dB)"],
        [[text(p['part']), text(p['name']), text(p['kind']), number(p['calibrated'], 1),
          number(p['quantized'], 1)] for p in points]))
    return section


def attention(found, material, names):
    """Entropy and values of attention."""
    section = Section('attention', 'Attention', [
        'Entropy of attention rows by head, as a share of the largest possible. Where the '
        'quantized entropy falls to zero a head looks at one key only; where it rises to one it '
        'looks at nothing in particular: attention has lost its diversity.'])
    heads = found.get('attention')
    if not heads:
        section.missing.append('Left out: no quantized attention was seen.')
        return section
    section.add('entropy', signal_figures.attention_entropy(heads, names))
    section.add('softmax', signal_figures.softmax_values(
        found['activations'], material.samples, names))
    section.tables.append(Table(
        'heads', 'Every head', ['attention', 'head', 'entropy, float', 'entropy, quantized',
                                'rows quantized to zero (percent)'],
        [[text(h['name']), number(h['head'], 0), number(h['float_entropy'], 3),
          number(h['entropy'], 3), number(h['dead'], 2, 100)] for h in heads]))
    return section


def activations(found, material, names):
    """Ranges, distributions and clipping of activations."""
    section = Section('activations', 'Activations', [
        'Range (0.1% to 99.9% of the values) of what arrives at each quantizer, in the float and '
        'in the quantized model, half of them in the thick part, and the levels of the grid. '
        'Clipped is what lies more than a step beyond them. A scale is the step of a uniform '
        'grid, the largest power of a logarithmic one, whose levels are powers minus the shift '
        '(0.17 after a GELU, whose least value is -0.17).'])
    entries = found.get('activations')
    if not entries:
        section.missing.append('Left out: no quantized activation was seen.')
        return section
    section.add('ranges', signal_figures.ranges(entries, material.grids, names))
    section.add('grids', signal_figures.grids(entries, material.samples, material.grids, names),
                'The outermost bars hold all values beyond. Axes are logarithmic where grids are.')
    section.tables.append(Table(
        'activations-all', 'Every activation quantizer',
        ['quantizer', 'role', 'kind', 'bits', 'scales', 'least scale', 'largest scale',
         'shift', 'float 0.1%', 'float 99.9%', 'quantized 0.1%', 'quantized 99.9%',
         'least level', 'largest level', 'clipped (percent)', 'becomes zero (percent)',
         'SQNR (dB)'],
        [[text(e['name']), text(e['role']), text(e['kind']), number(e['bits'], 0),
          number(e['scales'], 0), *(brief(e[k]) for k in (
              'scale_min', 'scale_max', 'shift', 'float_low', 'float_high', 'low', 'high',
              'grid_low', 'grid_high')),
          number(e['clipped'], 3, 100), number(e['zeroed'], 1, 100), number(e['sqnr_db'], 1)]
         for e in entries]))
    return section


def weights(found):
    """Rounding and scales of weights."""
    section = Section('weights', 'Weights', [
        'How many weights are not on the level nearest to their float value (learning has moved '
        'them), and how far scales of output channels lie apart.'])
    entries = [e for e in found.get('layers') or () if e.get('flipped') is not None]
    if not entries:
        section.missing.append('Left out: it needs the float checkpoint and images.')
        return section
    section.add('weights', signal_figures.weights(entries))
    section.tables.append(Table(
        'weights-all', 'Every quantized weight',
        ['layer', 'bits', 'not nearest (percent)', 'two levels or more (percent)', 'SQNR (dB)',
         'least scale', 'largest scale', 'largest / least', 'levels used (percent)'],
        [[text(e['name']), number(e['weight_bits'], 0), number(e['flipped'], 2, 100),
          number(e['moved'], 2, 100), number(e['weight_sqnr_db'], 1), brief(e['scale_min']),
          brief(e['scale_max']), number(e['scale_spread'], 1), number(e['levels_used'], 0, 100)]
         for e in entries]))
    return section


def detections(found, material):
    """Images with the detections of both models."""
    section = Section('detections', 'Detections', [
        'Detections with a score of at least 0.3 of the float and the quantized model, images '
        'with the worst disagreement first. Disagreement is 1 minus the summed overlap (IoU) of '
        'matched detections of one class over the number of detections of the model with more.'])
    agreement = found.get('agreement')
    if agreement:
        section.text = [f"On {100 * agreement['same_class']:.0f}% of {agreement['images']} images "
                        'of the test split both models name the same class.']
        section.missing.append('A classifier has no boxes or masks to draw.')
        return section
    if not found.get('disagreements'):
        section.missing.append('Left out: it needs the float checkpoint and images.')
        return section
    shown, gone = gallery(material.pairs, material.classes)
    for number_, (_, figure) in enumerate(shown):
        section.add(f'detections_{number_}', figure)
    if gone:
        section.missing.append(f'{len(gone)} images cannot be read any more, such as {gone[0]}.')
    section.tables.append(Table(
        'disagreements', f"All {found['compared_images']} images that were compared",
        ['image', 'disagreement', 'matched', 'only float', 'only quantized', 'mean IoU'],
        [[text(d['image']), number(d['disagreement'], 3), number(d['matched'], 0),
          number(d['only_float'], 0), number(d['only_quantized'], 0), number(d['mean_iou'], 3)]
         for d in found['disagreements']]))
    return section


def layers(report):
    """Every layer of the census."""
    found = report['diagnostics']
    section = Section('layers', 'Every layer', [
        'Local SQNR: output of the quantized layer against that of the float layer for the same '
        'input, its own error alone. Of a matmul the grid of the right operand (k, v) is shown; '
        'section Activations has both, and says what a scale is.'])
    entries = found.get('layers') or report.get('layers') or []
    section.add('local', signal_figures.local_errors(found.get('layers') or []))
    quantizers = {e['name']: e for e in found.get('activations') or ()}

    def input_of(entry):
        """The quantizer of a layer's input, of a matmul's right operand."""
        for end in ('input_quantizer', 'right_quantizer'):
            if f"{entry['name']}.{end}" in quantizers:
                return quantizers[f"{entry['name']}.{end}"]
        return {}

    def grid_of(entry):
        """The kind of that quantizer, and whether class tokens have another one."""
        kind = input_of(entry).get('kind')
        return f'{kind}, class tokens own' if entry.get('class_tokens') == 'own' else kind

    section.tables.append(Table(
        'layers-all', 'Every layer', ['layer', 'kind', 'weight bits', 'input bits', 'input grid',
                                      'input scale', 'largest weight scale', 'local SQNR (dB)',
                                      'not quantized'],
        [[text(e['name']), text(e['kind']), number(e['weight_bits'], 0),
          number(e['activation_bits'], 0), text(grid_of(e)),
          brief(input_of(e).get('scale_max')),
          brief(e.get('scale_max')), number(e.get('sqnr_db'), 1), text(e['skipped_reason'])]
         for e in entries]))
    return section
