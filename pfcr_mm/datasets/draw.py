"""`draw=dict(count, seed, rest)`: some images of a set at random, or all the others."""
import torch

from ..errors import UsageError


def checked_draw(draw):
    """`draw` with its defaults, None as it is; UsageError for a mistake in it."""
    if draw is None:
        return None
    known = dict(count=None, seed=0, rest=False)
    for key in draw:
        if key not in known:
            raise UsageError(f'draw.{key} is not a known key; choose of {list(known)}')
    draw = {**known, **draw}
    if not isinstance(draw['count'], int) or draw['count'] < 1:
        raise UsageError(f"draw.count={draw['count']!r} is not an integer of 1 or more")
    return draw


def drawn(items, draw, where):
    """The items drawn, or the others; both keep their order.

    Args:
        items (list): anything.
        draw (dict): from `checked_draw`.
        where (str): what the items come from, for the error.
    """
    count = draw['count']
    if count >= len(items):
        raise UsageError(f'draw.count={count} leaves nothing of the {len(items)} images in '
                         f'{where} to evaluate on')
    generator = torch.Generator().manual_seed(draw['seed'])
    picked = set(torch.randperm(len(items), generator=generator)[:count].tolist())
    return [item for i, item in enumerate(items) if (i in picked) != draw['rest']]
