"""`draw=dict(count, seed, rest)`: some images of a set at random, or all the others."""
import torch

from ..errors import UsageError, check_keys


def checked_draw(draw):
    """`draw` with its defaults, None as it is; UsageError for a mistake in it."""
    if draw is None:
        return None
    known = dict(count=None, seed=0, rest=False)
    if not isinstance(draw, dict):
        raise UsageError(f'draw={draw!r} is no dict; give dict(count=..., seed=..., rest=...), or '
                         'None for all images')
    check_keys(draw, known, 'draw')
    draw = {**known, **draw}
    for key, least in (('count', 1), ('seed', 0)):
        value = draw[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f'draw.{key}={value!r} is not an integer of {least} or more')
    if not isinstance(draw['rest'], bool):
        raise UsageError(f"draw.rest={draw['rest']!r} is not True or False")
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
