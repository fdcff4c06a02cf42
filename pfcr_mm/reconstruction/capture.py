"""Streams: what flows through a chain, image by image, at the boundaries of units."""
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmengine.logging import print_log

from .. import parallel
from ..models.chain import State
from ..modules import weights_once
from .cache import FeatureCache
from .faults import BatchLimit
from .feed import collate, looking_ahead, made_ahead

_AT_ONCE = 8


class Stream:
    """One State an image, kept on the CPU; batches are drawn among equal shapes.

    Of several processes each holds the states of its own images.

    Args:
        states (list[State | Kept]): one an image.
        numbers (list[int] | None): of the images, over all processes; None counts from 0.
    """

    def __init__(self, states, numbers=None):
        self.states = list(states)
        self.numbers = list(range(len(self.states)) if numbers is None else numbers)

    def __len__(self):
        return len(self.states)

    def batch(self, indices, device):
        """The states `indices`, which share their shapes, as one batch in float32."""
        states = [self.states[i] for i in indices]
        return State(collate((s.tensors for s in states), device), states[0].meta)

    def batches(self, size, device, chosen=None):
        """Yield (indices, State) for all states or those `chosen`, equal shapes together."""
        chosen = range(len(self)) if chosen is None else set(chosen)
        buckets = ([i for i in bucket if i in chosen] for bucket in self.buckets())
        parts = (bucket[k:k + size] for bucket in buckets for k in range(0, len(bucket), size))

        def make(item):
            indices, following = item
            self.ahead(following or ())
            state = self.batch(indices, device)
            return (indices, state), state.tensors

        yield from made_ahead(make, looking_ahead(parts), torch.device(device))

    def ahead(self, indices):
        """These states will be looked at soon."""
        for state in (self.states[i] for i in indices):
            state.ahead()

    def buckets(self):
        """Lists of indices whose states can be batched together."""
        return _grouped(enumerate(map(_kind, self.states)))

    def held(self, numbers):
        """Indices of those of the images `numbers` that this process holds."""
        place = {number: i for i, number in enumerate(self.numbers)}
        return [place[number] for number in numbers if number in place]

    def roll_call(self):
        """The images of all processes; all must call it.

        Returns:
            Roll: alike in all processes.
        """
        held = parallel.whole(parallel.Shard(
            [(number, _kind(state), state.rows)
             for number, state in zip(self.numbers, self.states)], self.numbers))
        return Roll(_grouped((number, kind) for number, kind, _ in held),
                    {number: rows for number, _, rows in held})


@dataclass
class Roll:
    """The images that a stream has in all processes together.

    Args:
        buckets (list[list[int]]): numbers of images that can be batched together.
        rows (dict[int, int]): rows of the first tensor by image, ascending.
    """

    buckets: list
    rows: dict

    def rows_of(self, numbers):
        """Rows of these images together."""
        return sum(self.rows[number] for number in numbers)


class Images(Sequence):
    """The calibration images that a process holds: (inputs (1, 3, H, W), data samples) pairs.

    Args:
        states (list[Kept]): the inputs.
        samples (list): data samples of each.
        numbers (list[int]): of the images, over all processes.
    """

    def __init__(self, states, samples, numbers):
        self.states, self.samples, self.numbers = states, samples, numbers

    def __len__(self):
        return len(self.states)

    def __getitem__(self, index):
        return self.states[index].tensors[0], self.samples[index]

    def stream(self):
        """Stream into the backbone, of the same states."""
        return Stream(self.states, self.numbers)


class Targets(Sequence):
    """What a unit should put out, as tuples of tensors, an entry an image.

    Args:
        *streams (Stream): whose tensors follow each other: outputs and side outputs.
    """

    def __init__(self, *streams):
        self.streams = streams

    def __len__(self):
        return len(self.streams[0])

    def ahead(self, indices):
        """These entries will be looked at soon."""
        for stream in self.streams:
            stream.ahead(indices)

    def __getitem__(self, index):
        return sum((stream.states[index].tensors for stream in self.streams), ())


def advance(chain, stream, start, stop, device, at_once=None, cache=None, sides=True):
    """Run leaves [start, stop) over a stream.

    Args:
        chain (Chain): of the quantized or of the float model.
        stream (Stream): the states before `start`.
        start, stop (int): leaves.
        device (torch.device): where to compute.
        at_once (int | None): images computed together at most, and 8 at most.
        cache (FeatureCache | None): keeps what comes out; None keeps it in memory as it is.
        sides (bool): whether side outputs are wanted.

    Returns:
        tuple[Stream, Stream | None]: the states after `stop`, and the side outputs on the way.
    """
    return run_over(
        stream, lambda state: chain.run(state, start, stop),
        [m for leaf in chain.leaves[start:stop] for m in leaf.modules],
        f'{chain.name} between its units', device, at_once, cache, sides)


def run_over(stream, function, modules, where, device, at_once=None, cache=None, sides=False):
    """Run a function over a stream, and keep what it gives.

    Args:
        function (Callable): State -> (State, tuple of side outputs), batch first.
        cache, sides: see `advance`; the others `in_batches`.

    Returns:
        tuple[Stream, Stream | None]: what it gives, and its side outputs.
    """
    cache = cache or FeatureCache()

    def run(batches):
        states, side_states = [None] * len(stream), [None] * len(stream)
        shelf, side_shelf = cache.shelf(), cache.shelf()
        for indices, batch in batches:
            state, side = function(batch)
            sizes = [stream.states[i].rows for i in indices]
            for k, i in enumerate(indices):
                # kept at once: nothing piles up on the device or in float32
                states[i] = shelf.keep(State(_part(state.tensors, sizes, k), state.meta))
                if sides:
                    side_states[i] = side_shelf.keep(State(_part(side, sizes, k)))
        return (Stream(states, stream.numbers),
                Stream(side_states, stream.numbers) if sides else None)

    return in_batches(stream, run, modules, where, device, at_once)


@torch.no_grad()
def in_batches(stream, run, modules, where, device, at_once=None):
    """Go through a stream, equal shapes together; where memory runs out, again with fewer.

    Args:
        stream (Stream): to go through.
        run (Callable): takes an iterator of (indices, State), the batches.
        modules (list[nn.Module]): that it uses; they quantize their weights once.
        where (str): what it is, to be told where memory runs out.
        device (torch.device): where to compute.
        at_once (int | None): images together at most, and 8 at most.

    Returns:
        what `run` returns.
    """
    limit = BatchLimit(_AT_ONCE, where, _log, at_once)
    with weights_once(modules):
        return limit.run(lambda size: run(stream.batches(size, device)))


def _log(line):
    print_log(line, 'current', logging.WARNING)


def split(entries, held_out):
    """Entries for learning and for accepting.

    The last `held_out` are for accepting; where that leaves none for one of both, all are for both.
    """
    indices = list(entries)
    cut = len(indices) - held_out
    return (indices[:cut], indices[cut:]) if 0 < cut < len(indices) else (indices, indices)


def _kind(state):
    """What states must share to be batched."""
    return tuple(shape[1:] for shape in state.shapes), state.meta


def _grouped(pairs):
    """Lists of keys with the same value, in order."""
    groups = defaultdict(list)
    for key, value in pairs:
        groups[value].append(key)
    return list(groups.values())


def _part(tensors, sizes, k):
    start = sum(sizes[:k])
    return tuple(t[start:start + sizes[k]] for t in tensors)
