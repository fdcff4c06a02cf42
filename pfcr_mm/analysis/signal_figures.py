"""Figures of signals: SQNR along the model, attention, activations, weights."""
import math
import re
from statistics import median

import torch

from .activations import ROLES, quantiles
from .style import COLOURS, MARKERS, brief_part, figure, short, title

# Ends of quantizers' names, and what is left of them under an axis.
_PLACES = {
    r'\.input_quantizer$': '', r'(\.attn)?(\.w_msa)?\.matmul_\w+\.\w+_quantizer$': '',
    r'(\.attn)?(\.w_msa)?\.qkv$': ' qkv', r'\.(ffn\.layers\.0\.0|mlp\.fc1)$': ' fc1',
    r'\.(ffn\.layers\.1|mlp\.fc2)$': '', r'\.downsample\.reduction$': ' merge',
    r'^neck\.lateral_convs\.(\d+)\.conv$': r'map \1'}
_TOP = 60.0  # dB; what is exact is drawn there
_BY_HEAD = ('q', 'k', 'v', 'softmax')  # roles whose groups are heads
_FEW = 16  # levels that are all drawn
_LONE = 8.0  # so many times the median range and an axis becomes logarithmic


def propagation(points, labels):
    """SQNR behind every leaf, through all parts; None without points.

    Here and below `labels` is what each state is called.
    """
    points = [p for p in points if p['kind'] == 'leaf']
    if not points:
        return None
    made, ((axis, ), ) = figure(3.8)
    for state in ('calibrated', 'quantized'):
        values = [p[state] for p in points]
        if any(v is not None for v in values):
            axis.plot(range(len(points)), [_drawn(v) for v in values], marker=MARKERS[state],
                      ms=4, lw=1, color=COLOURS[state], label=labels[state],
                      ls='--' if state == 'calibrated' else '-')
    _parts(axis, [p['part'] for p in points])
    axis.set_xticks(range(len(points)), [short(p['name'], 22) for p in points], rotation=90,
                    fontsize=6.5)
    axis.set_ylabel('SQNR of the output (dB)')
    axis.grid(axis='y', lw=0.4, alpha=0.6)
    axis.legend(fontsize=8)
    worst = min(points, key=lambda p: _drawn(p['quantized']))
    gains = [p['quantized'] - p['calibrated'] for p in points
             if _number(p['quantized']) and _number(p['calibrated'])]
    title(made, f"Lowest SQNR: {_drawn(worst['quantized']):.1f} dB at {worst['part']}."
          f"{short(worst['name'])}"
          + (f'; against calibration only: {median(gains):+.1f} dB (median)' if gains else ''))
    return made


def attention_entropy(heads, labels):
    """Entropy of each head, float against quantized; None without attention."""
    if not heads:
        return None
    made, ((axis, other), ) = figure(3.6, 1, 2)
    names = list(dict.fromkeys(h['name'] for h in heads))
    depth = [names.index(h['name']) for h in heads]
    drawn = axis.scatter([h['float_entropy'] for h in heads], [h['entropy'] for h in heads],
                         c=depth, cmap='viridis', s=18, edgecolors='black', linewidths=0.3)
    axis.plot([0, 1], [0, 1], color='black', lw=0.7)
    axis.set_xlabel('entropy, float (0: one key, 1: all keys)', fontsize=8)
    axis.set_ylabel('entropy, quantized', fontsize=8)
    bar = made.colorbar(drawn, ax=axis)
    bar.set_label('attention number, input to output', fontsize=8)
    bar.ax.tick_params(labelsize=7)
    for key, state in (('float_entropy', 'float'), ('entropy', 'quantized')):
        other.plot(depth, [h[key] for h in heads], MARKERS[state], color=COLOURS[state], ms=4,
                   mfc='none' if state == 'float' else COLOURS[state], label=labels[state])
    other.set_xticks(range(len(names)), [short(n, 16) for n in names], rotation=90, fontsize=6.5)
    other.set_ylabel('entropy of each head', fontsize=8)
    other.legend(fontsize=8)
    change = [h['entropy'] - h['float_entropy'] for h in heads]
    most = max(range(len(heads)), key=lambda i: abs(change[i]))
    title(made, f'Attention entropy changes by {median(change):+.2f} (median head), most by '
          f"{change[most]:+.2f} in {short(heads[most]['name'])} head {heads[most]['head']}")
    return made


def softmax_values(entries, samples, labels):
    """Distribution of attention weights in both models; None without attention."""
    entries = [e for e in entries if e['role'] == 'softmax']
    if not entries:
        return None
    made, ((axis, ), ) = figure(3.0)
    bins = torch.linspace(-8, 0, 81)
    for position, state in ((0, 'float'), (1, 'quantized')):
        values = torch.cat([samples[e['name']][position].flatten() for e in entries])
        counts = torch.histogram(values.clamp(min=1e-8).log10(), bins)[0]
        axis.stairs((counts / counts.sum() * 100).tolist(), bins.tolist(), color=COLOURS[state],
                    ls='-' if position else '--', lw=1.2, label=f'{labels[state]}, what arrives')
    edges = [e['grid_high'] for e in entries if e['grid_high']]
    if edges:
        axis.axvline(math.log10(median(edges)), color=COLOURS['bad'], lw=0.8, ls=':',
                     label='largest level (median attention)')
    axis.set_xlabel('log10 of attention weight (the first bar holds all below)')
    axis.set_ylabel('share of values (percent)')
    axis.legend(fontsize=8)
    gone = [e['zeroed'] for e in entries if e['zeroed'] is not None]
    worst = max((e for e in entries if e['zeroed'] is not None), key=lambda e: e['zeroed'],
                default=None)
    title(made, 'Attention weights' + (
        f': quantization makes {100 * median(gone):.0f}% of them zero (median attention), most '
        f"{100 * worst['zeroed']:.0f}% in {short(worst['name'])}" if worst else ''))
    return made


def ranges(entries, levels, labels):
    """Spread of activations by role and layer, float against quantized, under their grids.

    Args:
        entries (list[dict]): of `activations`.
        levels (dict[str, Tensor | None]): by quantizer, see `grid`.
        labels (dict[str, str]): what each state is called.
    """
    found = {role: [e for e in entries if e['role'] == role] for role in ROLES if role != 'other'}
    found = {role: chosen for role, chosen in found.items() if chosen}
    if not found:
        return None
    rows = -(-len(found) // 2)
    made, axes = figure(0.7 + 2.4 * rows, rows, 2)
    for axis, (role, chosen) in zip(axes.flat, found.items()):
        for shift, key, state in ((-0.18, 'float_', 'float'), (0.18, '', 'quantized')):
            x = [i + shift for i in range(len(chosen))]
            for low, high, width in (('low', 'high', 1.0), ('q1', 'q3', 3.2)):
                axis.vlines(x, [e[key + low] for e in chosen], [e[key + high] for e in chosen],
                            color=COLOURS[state], lw=width,
                            label=f'{labels[state]}, half of the values thick' if low == 'q1'
                            else None)
        places, drawn = [], []
        for i, entry in enumerate(chosen):
            own = levels.get(entry['name'])
            if own is not None:
                own = own[entry['worst_group']]
                own = own if len(own) <= _FEW else own[[0, -1]]
                places += [i] * len(own)
                drawn += own.tolist()
        axis.plot(places, drawn, '_', ms=7, mew=0.7, color=COLOURS['bad'],
                  label='levels of the grid (beyond 4 bits its ends)')
        axis.set_title(ROLES[role], fontsize=9)
        axis.set_xticks(range(len(chosen)), [_place(e['name']) for e in chosen], rotation=90,
                        fontsize=6.5)
        axis.set_ylabel('value (0.1% to 99.9%)', fontsize=8)
        reach = [max(abs(e[k]) for k in ('float_low', 'float_high', 'low', 'high', 'grid_low',
                                         'grid_high') if e[k] is not None) for e in chosen]
        if max(reach) > _LONE * median(reach) > 0:  # one would leave no room for the others
            axis.set_yscale('symlog', linthresh=median(reach))
            lows = [e[k] for e in chosen for k in ('float_low', 'low', 'grid_low')
                    if e[k] is not None]
            axis.set_ylim(bottom=min(lows) - 0.1 * median(reach))
            axis.set_ylabel(f'value; logarithmic beyond {median(reach):.1f}', fontsize=8)
    made.legend(*axes.flat[0].get_legend_handles_labels(), fontsize=7, ncols=3,
                loc='outside lower right')
    for axis in axes.flat[len(found):]:
        axis.set_visible(False)
    known = [e for e in entries if e['clipped'] is not None]
    worst = max(known, key=lambda e: e['clipped'], default=None)
    title(made, 'Activation ranges and their grids' + (
        f": most clipped {100 * worst['clipped']:.1f}% at {short(worst['name'])} "
        f"(median {100 * median(e['clipped'] for e in known):.2f}%)" if worst else ''))
    return made


def grids(entries, samples, levels, labels):
    """Distribution under the grid, for the noisiest layer of each role.

    Where the grid is logarithmic so is the axis, of value plus shift: levels are equidistant
    there, and its left end stands for zero and all below.
    """
    worst = {}
    for entry in entries:
        if entry['sqnr_db'] is not None and levels.get(entry['name']) is not None:
            best = worst.setdefault(entry['role'], entry)
            if entry['sqnr_db'] < best['sqnr_db']:
                worst[entry['role']] = entry
    worst = {role: worst[role] for role in ROLES if role in worst}
    if not worst:
        return None
    rows = -(-len(worst) // 2)
    made, axes = figure(0.7 + 2.2 * rows, rows, 2)
    for axis, (role, entry) in zip(axes.flat, worst.items()):
        group, shift = entry['worst_group'], entry['shift']
        steps = levels[entry['name']][group]
        floating, own = (_column(s, group) for s in samples[entry['name']])
        edges = _bins(steps, torch.cat([floating, own]), shift)
        for values, state in ((floating, 'float'), (own, 'quantized')):
            values = (values + (shift or 0)).clamp(edges[0], edges[-1])
            counts, _ = torch.histogram(values, edges)
            axis.stairs((100 * counts / counts.sum()).tolist(), edges.tolist(), lw=1.1,
                        color=COLOURS[state], ls='--' if state == 'float' else '-',
                        label=labels[state])
        axis.vlines((steps + (shift or 0)).clamp(min=edges[0]).tolist(), 0, 0.08,
                    color=COLOURS['bad'], lw=0.9, transform=axis.get_xaxis_transform(),
                    label='levels of the grid')
        if shift is not None:
            axis.set_xscale('log')
        axis.set_xlabel(f'value + {shift:g}' if shift else 'value', fontsize=7.5)
        head = f', head {group}' if entry['scales'] > 1 and role in _BY_HEAD else ''
        axis.set_title(f"{ROLES[role]}: {short(entry['name'], 30)}{head}\n"
                       f"{entry['kind']}, {entry['bits']} bits, {entry['sqnr_db']:.1f} dB",
                       fontsize=8)
        axis.set_yscale('log')
        axis.set_ylabel('share (percent)', fontsize=7.5)
    axes.flat[0].legend(fontsize=7)
    for axis in axes.flat[len(worst):]:
        axis.set_visible(False)
    lowest = min(worst.values(), key=lambda e: e['sqnr_db'])
    title(made, f"Activations under their grids, the noisiest of each role: lowest "
          f"{lowest['sqnr_db']:.1f} dB at {short(lowest['name'])}")
    return made


def _bins(levels, values, shift, count=60):
    """Edges of bins that hold the levels and most of the values; of powers for a log grid."""
    low, _, _, high = quantiles(values)
    low, high = min(low, levels.min().item()), max(high, levels.max().item())
    if shift is not None:
        powers = levels + shift
        # a step below the smallest power, where values become zero, and one more
        low = (powers[1]**3 / powers[2]**2).item()
        return torch.logspace(math.log10(low), math.log10(high + shift), count + 1)
    if not low < high:
        low, high = low - 1, high + 1
    return torch.linspace(low, high, count + 1)


def local_errors(layers):
    """Local SQNR of each layer in order, by bits; None without measured layers."""
    layers = [e for e in layers if _number(e['sqnr_db'])]
    if not layers:
        return None
    made, ((axis, ), ) = figure(3.2)
    bits = sorted({e['activation_bits'] for e in layers})
    for number, width in enumerate(bits):
        chosen = [(i, e['sqnr_db']) for i, e in enumerate(layers) if e['activation_bits'] == width]
        axis.plot(*zip(*chosen), 'osD^vPX*'[number % 8], ms=4.5, label=f'{width}-bit input',
                  color=['#0072B2', '#E69F00', '#009E73', '#CC79A7'][number % 4])
    _parts(axis, [_part(e['name']) for e in layers])
    axis.set_xlabel('layer, input to output')
    axis.set_ylabel('local SQNR (dB)')
    axis.grid(axis='y', lw=0.4, alpha=0.6)
    axis.legend(fontsize=8, ncols=len(bits))
    worst = sorted(layers, key=lambda e: e['sqnr_db'])[:3]
    for entry in worst:
        axis.annotate(short(entry['name'], 26), (layers.index(entry), entry['sqnr_db']),
                      fontsize=6.5, xytext=(3, -9), textcoords='offset points')
    title(made, f"Error that each layer adds by itself: worst {worst[0]['sqnr_db']:.1f} dB at "
          f"{short(worst[0]['name'])}, median {median(e['sqnr_db'] for e in layers):.1f} dB")
    return made


def weights(layers):
    """Rounding against nearest, and the spread of weight scales, layer by layer."""
    layers = [e for e in layers if e.get('flipped') is not None]
    if not layers:
        return None
    made, ((axis, ), (other, )) = figure(4.4, 2, 1, sharex=True)
    x = range(len(layers))
    axis.bar(x, [100 * e['flipped'] for e in layers], color=COLOURS['quantized'], width=0.8,
             label='another level than the nearest')
    axis.bar(x, [100 * e['moved'] for e in layers], color=COLOURS['bad'], width=0.8, hatch='///',
             label='two levels away or more')
    axis.set_ylabel('share of weights (percent)', fontsize=8)
    axis.legend(fontsize=8)
    other.vlines(x, [e['scale_min'] for e in layers], [e['scale_max'] for e in layers],
                 color=COLOURS['quantized'], lw=2.5)
    other.set_yscale('log')
    other.set_ylabel('weight scales, least to\nlargest channel', fontsize=8)
    _parts(axis, [_part(e['name']) for e in layers])
    other.set_xlabel('layer, input to output')
    most = max(layers, key=lambda e: e['flipped'])
    wide = max(layers, key=lambda e: e['scale_spread'])
    left = (f"up to {100 * most['flipped']:.1f}% left their nearest level "
            f"({short(most['name'], 24)})" if most['flipped'] else 'all on their nearest level')
    title(made, f"Weights: {left}; scales differ up to {wide['scale_spread']:.0f}-fold "
          f"({short(wide['name'], 24)})")
    return made


def _parts(axis, names):
    """Borders between parts, with their names above the axes."""
    start = 0
    for i in range(1, len(names) + 1):
        if i == len(names) or names[i] != names[start]:
            if start:
                axis.axvline(start - 0.5, color=COLOURS['grey'], lw=0.7, ls=':')
            axis.text((start + i - 1) / 2, 1.01, brief_part(names[start]),
                      transform=axis.get_xaxis_transform(), ha='center', va='bottom', fontsize=7)
            start = i


def _part(name):
    first, *rest = name.split('.')
    return f'{first}.{rest[0]}' if first == 'roi_head' and rest else first


def _place(name):
    """Where it is: 's2.b1' for an operand of attention, 's2.b1 qkv' for a layer's input."""
    for end, brief in _PLACES.items():
        name = re.sub(end, brief, name)
    return short(name, 60)


def _column(values, group):
    return values[:, min(group, values.shape[1] - 1)]


def _number(value):
    return value is not None and math.isfinite(value)


def _or_nan(value):
    return math.nan if value is None else value


def _drawn(value):
    if value is None or math.isnan(value):
        return math.nan
    return max(-20.0, min(_TOP, value))
