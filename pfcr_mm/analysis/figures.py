"""Figures of the run's own records: AP by class, units, loss curves."""
import math
from statistics import median

from .style import COLOURS, MARKERS, brief_part, figure, title

_MOST_CLASSES = 25


def classes(by_class, metric, labels):
    """AP of each class, those that lost most first; None without figures.

    Args:
        by_class (dict): AP (0 to 1) by state, metric ('bbox', 'segm') and class.
        metric (str): which.
        labels (dict[str, str]): what each state is called.
    """
    states = {state: found[metric] for state, found in by_class.items() if found.get(metric)}
    if 'quantized' not in states or 'float' not in states:
        return None
    lost = {name: states['float'][name] - value for name, value in states['quantized'].items()
            if value is not None and states['float'].get(name) is not None}
    if not lost:
        return None
    names = sorted(lost, key=lambda name: -lost[name])
    shown = names[:_MOST_CLASSES]
    kind = dict(bbox='box', segm='mask')[metric]
    made, ((axis, ), ) = figure(1.2 + 0.26 * len(shown))
    rows = range(len(shown))
    axis.hlines(rows, [100 * min(s[n] for s in states.values() if s.get(n) is not None)
                       for n in shown],
                [100 * max(s[n] for s in states.values() if s.get(n) is not None)
                 for n in shown], color=COLOURS['grey'], lw=1)
    for state, found in states.items():
        axis.plot([100 * found[n] if found.get(n) is not None else math.nan for n in shown], rows,
                  MARKERS[state], color=COLOURS[state], label=labels[state], ms=6,
                  mfc='none' if state == 'float' else COLOURS[state])
    axis.set_yticks(rows, [f'{n}  ({_signed(-100 * lost[n])})' for n in shown])
    axis.invert_yaxis()
    axis.set_xlabel(f'{kind} AP (percent); in brackets: {labels["quantized"]} minus float')
    axis.legend(fontsize=8, loc='best')
    worst = names[0]
    finding = (f'{worst} lost most ({100 * lost[worst]:.1f} points)' if lost[worst] > 0
               else 'none lost')
    title(made, f'{kind} AP by class: {finding}, '
          f'median class {_signed(-100 * median(lost.values()))}'
          + (f'; the {len(shown)} worst of {len(names)}' if len(names) > len(shown) else ''))
    return made


def units(records):
    """Held-out loss of every unit before and after learning; None without units.

    Args:
        records (list[dict]): `units` of report.json.
    """
    records = [r for r in records if r['loss_before'] and r['loss_after']]
    if not records:
        return None
    made, ((axis, ), ) = figure(3.6)
    for number, record in enumerate(records):
        colour = COLOURS['quantized' if record['accepted'] else 'bad']
        axis.plot([number, number], [record['loss_before'], record['loss_after']], color=colour,
                  lw=1)
    for accepted, marker, label in ((True, 'o', 'after, accepted'), (False, 'X', 'after, restored '
                                                                     '(undone)')):
        chosen = [(i, r['loss_after']) for i, r in enumerate(records) if r['accepted'] == accepted]
        axis.plot(*zip(*chosen), marker, color=COLOURS['quantized' if accepted else 'bad'], ms=4.5,
                  label=label) if chosen else None
    axis.plot(range(len(records)), [r['loss_before'] for r in records], '_', color='black', ms=6,
              label='before')
    borders = [i for i in range(1, len(records)) if _group(records[i]) != _group(records[i - 1])]
    for start, stop in zip([0, *borders], [*borders, len(records)]):
        if start:
            axis.axvline(start - 0.5, color=COLOURS['grey'], lw=0.6, ls=':')
        stage, part = _group(records[start])
        name = brief_part(part)
        axis.text((start + stop - 1) / 2, 1.01,
                  f'{name}\n(POS stage {stage})' if stop - start > len(records) // 6 else name,
                  transform=axis.get_xaxis_transform(), ha='center', va='bottom', fontsize=7)
    axis.set_yscale('log')
    axis.set_xlabel('unit, in the order of reconstruction')
    axis.set_ylabel('held-out loss (relative)')
    axis.legend(fontsize=8, ncols=3, loc='lower right')
    accepted = [r for r in records if r['accepted']]
    kept = median([r['loss_after'] / r['loss_before'] for r in accepted]) if accepted else 1
    title(made, f'{len(accepted)} of {len(records)} units were improved and kept'
          + (f': the median unit lost {100 * (1 - kept):.0f}% of its loss' if accepted else ''))
    return made


def curves(lines):
    """Loss while learning, relative to its first value, a panel a level.

    Args:
        lines (list[dict]): of units.jsonl, with 'curve', a list of [step, loss].
    """
    levels = {}
    for line in lines:
        points = [(s, v) for s, v in line.get('curve') or () if v]
        if len(points) > 1:
            levels.setdefault(line['level'], []).append((points, line['accepted']))
    if not levels:
        return None
    columns = min(4, len(levels))
    rows = -(-len(levels) // columns)
    made, axes = figure(0.6 + 2.1 * rows, rows, columns)
    falls = []
    for axis, (level, found) in zip(axes.flat, levels.items()):
        shares = [v / points[0][1] for points, _ in found for _, v in points]
        for points, accepted in found:
            steps, losses = zip(*points)
            axis.plot(steps, [v / losses[0] for v in losses], lw=0.9, alpha=0.7,
                      color=COLOURS['quantized' if accepted else 'bad'],
                      ls='-' if accepted else '--')
            falls.append(losses[-1] / losses[0])
        axis.axhline(1, color='black', lw=0.5)
        axis.set_title(f'{level} ({len(found)} unit{"s" * (len(found) > 1)})', fontsize=8)
        if max(shares) > 10 * min(shares):  # else its ticks would have no numbers to read
            axis.set_yscale('log')
        axis.set_xlabel('step', fontsize=8)
        axis.set_ylabel('loss / first loss', fontsize=8)
    for axis in axes.flat[len(levels):]:
        axis.set_visible(False)
    title(made, f'Loss while learning: it ends at {median(falls):.2f} of its start in the median '
          'unit (restored units dashed)')
    return made


def _signed(value):
    return f'{round(value, 1) + 0.0:+.1f}'  # no minus zero


def _group(record):
    return record['pos_stage'], record['chain']
