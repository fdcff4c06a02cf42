"""Sensitivity: one layer or one unit quantized at a time, all others float."""
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from ..models import part_chains
from ..models.manifest import build_manifest
from ..modules import QuantLayer, QuantMatmul
from ..reconstruction.units import units_of
from .noise import FLOOR, Noise
from .probe import on_device
from .propagation import common_boxes, part_inputs
from .style import COLOURS, figure, short, title

SHARE = 0.5  # of the whole error: what the suggestion takes away


@dataclass
class Entry:
    """What quantizing one layer or unit does.

    Args:
        name (str): of the layer or unit.
        layers (list[str]): the layers in it.
        error (float): mean over the parts' outputs of error power over signal power.
        sqnr_db (float | None): the same in dB; None where nothing is lost.
        metrics (dict | None): AP (0 to 1) on the images, where that is measured.
        lost (float | None): of the first metric, against the float model.
    """

    name: str
    layers: list
    error: float
    sqnr_db: float | None
    metrics: dict | None = None
    lost: float | None = None


def groups_of(model, level):
    """Names of the quantized layers in each thing that is quantized at a time.

    Args:
        model (nn.Module): quantized.
        level (str): 'layer', or a level of units such as 'leaf', 'block', 'stage'.

    Returns:
        dict[str, list[str]]: layers by name, in order.
    """
    names = [r['name'] for r in build_manifest(model)['layers'] if not r['skipped_reason']]
    if level == 'layer':
        return {name: [name] for name in names}
    by_module = {id(module): name for name, module in model.named_modules()}
    groups = {}
    for chain in part_chains(model)[0].values():
        for unit in units_of(chain, level):
            inside = {by_module[id(m)] for leaf in chain.leaves[unit.start:unit.stop]
                      for root in leaf.modules for m in root.modules()
                      if isinstance(m, (QuantLayer, QuantMatmul))}
            groups[unit.name] = [name for name in names if name in inside]
    return {name: found for name, found in groups.items() if found}


@contextmanager
def quantized_only(floating, quantized, names):
    """The float twin with the layers `names` of the quantized model in it, inside the block."""
    kept = []
    try:
        for name in names:
            parent, _, child = name.rpartition('.')
            owner = floating.get_submodule(parent)
            kept.append((owner, child, getattr(owner, child)))
            setattr(owner, child, quantized.get_submodule(name))
        yield floating
    finally:
        for owner, child, module in reversed(kept):
            setattr(owner, child, module)


@torch.no_grad()
def sensitivity(floating, quantized, images, level='layer', measure=None, tell=None):
    """Quantize one thing at a time and measure what comes out of every part.

    Args:
        floating (nn.Module): float twin, folded alike (see `align`).
        quantized (nn.Module): calibrated, hardened, quantizers on.
        images (list): (inputs, data samples) pairs.
        level (str): see `groups_of`.
        measure (callable | None): metrics of a model, such as AP on a subset.
        tell (callable | None): called with (number, of, name) before each.

    Returns:
        list[Entry]: the most sensitive first, by metrics where there are some.
    """
    groups = groups_of(quantized, level)
    boxes = common_boxes(floating, images)
    reference = outputs(floating, images, boxes)
    base = measure(floating) if measure else None
    entries = []
    for number, (name, layers) in enumerate(groups.items()):
        if tell is not None:
            tell(number, len(groups), name)
        with quantized_only(floating, quantized, layers) as model:
            error = relative_error(reference, outputs(model, images, boxes))
            noise = Noise()
            noise.signal, noise.noise = 1.0, error
            metrics = measure(model) if measure else None
        entries.append(Entry(name, layers, error, noise.db, metrics))
    for entry in entries if base else ():
        key = next(iter(base))
        entry.lost = base[key] - entry.metrics[key]
    return sorted(entries, key=lambda e: (-(e.lost or 0.0), -e.error))


def outputs(model, images, boxes):
    """What each part of a model gives at its end: (part, i-th tensor) -> one tensor an image."""
    chains, _ = part_chains(model)
    found = {}
    for index, (inputs, _) in enumerate(images):
        inputs = on_device(model, inputs)
        for part, state in part_inputs(model, list(chains), inputs, boxes, index).items():
            state, side = chains[part].run(state)
            for i, tensor in enumerate((*state.tensors, *side)):
                found.setdefault((part, i), {})[index] = tensor.cpu()
    return found


def relative_error(reference, values):
    """Error power over signal power, summed over images, averaged over outputs.

    The backbone's maps count only where nothing follows them: what a neck and heads make of
    them is what matters.
    """
    keys = [key for key in reference if key[0] != 'backbone'] or list(reference)
    ratios = []
    for key in keys:
        noise = Noise()
        for index, tensor in reference[key].items():
            noise.add(tensor, values[key][index])
        if noise.signal > 0:
            ratios.append(noise.noise / noise.signal)
    return sum(ratios) / max(1, len(ratios))


def suggestion(entries, base, quant=None, bits=8, share=SHARE):
    """A config with more bits for the layers that make `share` of what all lose.

    That is AP where it was measured and something has lost some, else error.

    Args:
        entries (list[Entry]): of `sensitivity`.
        base (str): path of the config that was looked at, from where this one will be.
        quant (dict | None): its `model.quant`: what it has of its own stays.
        bits (int): to give them.
        share (float): 0 to 1.

    Returns:
        str: a config on top of `base`; the same as an exclude list is in its comment.
    """
    quant = quant or {}
    by_ap = any((e.lost or 0.0) > 0 for e in entries)
    losses = [(max(0.0, e.lost) if by_ap else e.error, e) for e in entries]
    total, so_far, names = sum(loss for loss, _ in losses), 0.0, []
    for loss, entry in sorted(losses, key=lambda pair: -pair[0]):
        if total == 0 or so_far >= share * total:
            break
        so_far += loss
        names += [name for name in entry.layers if name not in names]
    lines = [f'# {len(names)} layers that make {100 * so_far / total if total else 0:.0f}% of the '
             f"{'AP lost' if by_ap else 'error'}, summed over all, each quantized alone.",
             '# A config as it is: tools/quant.py THIS_FILE. To leave them float instead:',
             f"# model = dict(quant=dict(exclude={[*quant.get('exclude', ()), *names]!r}))",
             f'_base_ = {base!r}', 'model = dict(quant=dict(overrides=[',
             *(f'    {dict(override)!r},' for override in quant.get('overrides', ()))]
    lines += [f'    dict(pattern={name!r}, weight_bits={bits}, activation_bits={bits}),'
              for name in names]
    return '\n'.join([*lines, ']))', ''])


def plot(entries, level, metric=None, shown=30):
    """The most sensitive as bars: error (dB), or AP lost where it was measured."""
    top = entries[:shown]
    made, ((axis, ), ) = figure(1.0 + 0.2 * len(top))
    values = [100 * e.lost if metric else
              (FLOOR if e.sqnr_db is None else e.sqnr_db) for e in top]
    axis.barh(range(len(top)), values, color=COLOURS['quantized'])
    axis.set_yticks(range(len(top)), [short(e.name, 44) for e in top], fontsize=7.5)
    axis.invert_yaxis()
    for row, value in enumerate(values):
        axis.text(max(value, 0) if metric else value, row, f' {value:.1f}', va='center', fontsize=7)
    axis.set_xlabel(f'{metric} lost on the images (points), only this quantized' if metric else
                    "SQNR of the parts' outputs (dB), only this quantized: shorter is worse")
    title(made, f'Most sensitive {level}: {short(top[0].name, 44)}; '
          f'the {len(top)} worst of {len(entries)}')
    return made


def as_data(entries):
    """Plain data for sensitivity.json."""
    return [asdict(entry) for entry in entries]
