"""Units: contiguous runs of leaves of a chain, from one leaf to the whole chain."""
from dataclasses import dataclass
from itertools import groupby

from ..errors import UsageError
from ..models.whole import WHOLE
from ..modules import quantizers_of
from .views import layers_of

# Fine to coarse. 'layer' is finer than what PFCR starts from; 'backbone' is the whole chain,
# also under its plain name 'chain'.
# Where a chain has groups of blocks, they take the place of quads, and 'double' is two of them.
# Coarsest is the whole detector, a chain of its own.
LEVELS = ('layer', 'leaf', 'block', 'pair', 'quad', 'group', 'double', 'stage', 'backbone',
          'chain', WHOLE)
_LETTERS = dict(layer='l', block='B', pair='P', quad='Q', group='G', double='GG', stage='S',
                backbone='ALL', chain='ALL', detector='ALL')


@dataclass(frozen=True)
class Unit:
    """Leaves [start, stop) of a chain.

    Args:
        name (str): full names of the first and last leaf's common part.
        chain (str): name of the chain.
        level (str): one of LEVELS.
        label (str): short name in traversal strings, such as 'B3'.
        layer (str): of the level 'layer', which of the leaf's layers it is (see
            `layers_of`); a unit otherwise has all of them.
    """

    name: str
    chain: str
    level: str
    label: str
    start: int
    stop: int
    layer: str = ''


def check_levels(levels, key):
    """Return the levels fine to coarse, or raise UsageError for an unknown one."""
    for level in levels:
        if level not in LEVELS:
            raise UsageError(f'{key} has {level!r}, which is no level; choose of {LEVELS}')
    return sorted(set(levels), key=LEVELS.index)


def units_of(chain, level):
    """All units of one level.

    Units of a single leaf are left to the level 'leaf', and leaves with nothing to
    quantize are no units of their own.

    Args:
        chain (Chain): leaves in order.
        level (str): one of LEVELS.

    Returns:
        list[Unit]: in order; empty where the chain has no such level.
    """
    if (level == WHOLE) != (chain.name == WHOLE):
        return []
    if level == 'layer':
        return _layers(chain)
    slices = _slices(chain.leaves, level)
    units, counts = [], {}
    for start, stop in slices:
        if level == 'leaf':
            letter = chain.leaves[start].letter
        else:
            letter = _LETTERS[level]
        counts[letter] = counts.get(letter, 0) + 1
        if not any(has_quantizers(leaf) for leaf in chain.leaves[start:stop]):
            continue
        label = letter if letter == 'ALL' else f'{letter}{counts[letter]}'
        units.append(Unit(_name(chain, level, start, stop), chain.name, level, label, start, stop))
    return units


def _layers(chain):
    """A unit for every quantized layer and matmul, in order of leaves."""
    units = []
    for i, leaf in enumerate(chain.leaves):
        layers = layers_of(leaf)
        several = len({key.partition('.')[0] for key in layers}) > 1
        for key in layers:
            name = key if several else key.partition('.')[2]
            units.append(Unit(
                f'{chain.name}.{leaf.name}.{name}'.rstrip('.'), chain.name, 'layer',
                f"{_LETTERS['layer']}{len(units) + 1}", i, i + 1, key))
    return units


def has_quantizers(leaf):
    """Whether any quantizer lives below the leaf."""
    return any(True for module in leaf.modules for _ in quantizers_of(module))


def _slices(leaves, level):
    if level == 'leaf':
        return [(i, i + 1) for i in range(len(leaves))]
    if level == WHOLE:
        return [(0, len(leaves))]
    if level in ('backbone', 'chain'):
        return [(0, len(leaves))] if len(leaves) > 1 else []
    if level == 'stage':
        runs = _runs(leaves, lambda leaf: leaf.stage)
        return [(start, stop) for start, stop in runs if stop - start > 1]
    if level in ('group', 'double'):
        return _merge(_runs(leaves, lambda leaf: leaf.group), 1 if level == 'group' else 2)
    if level == 'quad':
        leaves = [leaf if leaf.group is None else None for leaf in leaves]
    blocks = _runs(leaves, lambda leaf: leaf and leaf.block)
    size = dict(block=1, pair=2, quad=4)[level]
    slices = []
    # no unit below a stage or a group crosses its border
    for _, family in groupby(blocks, key=lambda run: (leaves[run[0]].stage, leaves[run[0]].group)):
        slices += _merge(list(family), size)
    return slices


def _merge(runs, size):
    """Runs of `size` neighbours each; an odd one out is a unit of a finer level already."""
    chunks = [runs[i:i + size] for i in range(0, len(runs), size)]
    return [(chunk[0][0], chunk[-1][1]) for chunk in chunks
            if size == 1 or len(chunk) > size // 2]


def _runs(leaves, key):
    """[start, stop) of neighbouring leaves with the same key, None left out."""
    runs = []
    for value, group in groupby(range(len(leaves)), key=lambda i: key(leaves[i])):
        group = list(group)
        if value is not None:
            runs.append((group[0], group[-1] + 1))
    return runs


def _name(chain, level, start, stop):
    first, last = chain.leaves[start].name, chain.leaves[stop - 1].name
    if level in ('backbone', 'chain', WHOLE):
        return chain.name
    if level == 'leaf':
        return f'{chain.name}.{first}'
    if level == 'stage':
        return f'{chain.name}.stages.{chain.leaves[start].stage}'
    first, last = first.rpartition('.')[0], last.rpartition('.')[0]
    return f'{chain.name}.{first}' if level == 'block' else (
        f"{chain.name}.{first}-{last.rpartition('.')[2]}")
