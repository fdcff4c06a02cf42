"""The schedule: the order in which units are reconstructed, fine to coarse."""
from ..errors import UsageError
from .units import LEVELS, check_levels, units_of

TRAVERSALS = ('post_order', 'level_order')


def build_schedule(chain, levels, traversal='post_order', key='levels'):
    """Order the units of `chain`.

    Post-order (A1, M1, B1, A2, M2, B2, P1, ...) runs a coarse unit right after its
    last child, as PFCR reads: merge what has just been reconstructed. Level order
    sweeps the whole chain level by level. Without the level 'leaf', leaves that
    belong to no block are units of their own beside the blocks.

    Args:
        chain (Chain): leaves in order.
        levels (list[str]): names from LEVELS.
        traversal (str): 'post_order' or 'level_order'.
        key (str): config key to name in errors.

    Returns:
        list[Unit]: in order of reconstruction.
    """
    if traversal not in TRAVERSALS:
        raise UsageError(f'traversal={traversal!r} is not known; choose one of {TRAVERSALS}')
    levels = check_levels(levels, key)
    units = [u for level in levels for u in units_of(chain, level)]
    if 'block' in levels and 'leaf' not in levels:
        # leaves outside of blocks (patch embedding, merging) have no coarser unit to wait for
        units += [u for u in units_of(chain, 'leaf') if chain.leaves[u.start].block is None]
    rank = LEVELS.index
    if traversal == 'post_order':
        return sorted(units, key=lambda u: (u.stop, -u.start, rank(u.level)))
    return sorted(units, key=lambda u: (rank(u.level), u.start))


def share_iterations(counts, total):
    """Scale iterations so that they are `total` together, each at least 1.

    Args:
        counts (list[int]): iterations of each unit, in order.
        total (int): at least one a unit.

    Returns:
        list[int]: in the same order.

    Example:
        >>> share_iterations([20, 60, 20], 10)
        [2, 6, 2]
    """
    shares, done, spent = [], 0, 0
    for number, count in enumerate(counts, 1):  # rounding is made up for at once
        done += count
        left = total - spent - (len(counts) - number)
        shares.append(min(left, max(1, round(total * done / sum(counts)) - spent)))
        spent += shares[-1]
    return shares


def traversal_string(units):
    """The schedule in one line, such as 'E1 A1 M1 B1 A2 M2 B2 P1'."""
    return ' '.join(unit.label for unit in units)
