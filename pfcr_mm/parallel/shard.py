"""Which entries of a whole a process holds."""
from .collectives import gather


class Shard(list):
    """The entries of a list that this process holds.

    Args:
        entries (Iterable): what is held.
        numbers (Iterable[int]): the place of each in the whole list, ascending.
    """

    def __init__(self, entries, numbers):
        super().__init__(entries)
        self.numbers = list(numbers)


def numbers_of(entries):
    """Places in the whole of the entries held; a plain list is the whole."""
    return getattr(entries, 'numbers', list(range(len(entries))))


def whole(entries):
    """The whole list, from what all processes hold of it; its entries must pickle."""
    parts = gather(list(zip(numbers_of(entries), entries)))
    return [entry for _, entry in sorted((e for part in parts for e in part), key=_place)]


def _place(numbered):
    return numbered[0]
