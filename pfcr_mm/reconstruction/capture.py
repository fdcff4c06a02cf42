"""Streams: what flows through a chain, image by image, at the boundaries of units."""
import logging
from collections import defaultdict
from dataclasses import dataclass

import torch
from mmengine.logging import print_log

from .. import parallel
from ..errors import UsageError
from ..models.chain import State
from ..modules import weights_once
from .faults import BatchLimit


class Stream:
    """One State an image, kept on the CPU; batches are drawn among equal shapes.

    Of several processes each holds the states of its own images.

    Args:
        states (list[State]): one an image.
        dtype (torch.dtype | None): storage type of floating tensors; None keeps it.
        numbers (list[int] | None): of the images, over all processes; None counts from 0.
    """

    def __init__(self, states, dtype=None, numbers=None):
        self.states = [_stored(state, dtype) for state in states]
        self.numbers = list(range(len(self.states)) if numbers is None else numbers)
        if dtype == torch.float16 and any(
                torch.isinf(t).any() for s in self.states for t in s.tensors):
            raise UsageError(
                "quantize_cfg.cache_dtype='float16' overflows here; use 'bfloat16' or None")

    def __len__(self):
        return len(self.states)

    def batch(self, indices, device):
        """The states `indices`, which share their shapes, as one batch in float32."""
        states = [self.states[i] for i in indices]
        tensors = tuple(
            torch.cat(parts).to(device, torch.float32)
            for parts in zip(*(s.tensors for s in states)))
        return State(tensors, states[0].meta)

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
            [(number, _kind(state), state.tensors[0].shape[0])
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


@torch.no_grad()
def advance(chain, stream, start, stop, device, batch_size=8, dtype=None):
    """Run leaves [start, stop) over a stream.

    Returns:
        tuple[Stream, Stream]: the states after `stop`, and the side outputs on the way.
    """
    limit = BatchLimit(batch_size, f'{chain.name} between its units', _log)
    with weights_once([m for leaf in chain.leaves[start:stop] for m in leaf.modules]):
        return limit.run(lambda size: _advance(chain, stream, start, stop, device, size, dtype))


def _log(line):
    print_log(line, 'current', logging.WARNING)


def _advance(chain, stream, start, stop, device, batch_size, dtype):
    states, sides = [None] * len(stream), [None] * len(stream)
    for bucket in stream.buckets():
        for chunk in _chunks(bucket, batch_size):
            state, side = chain.run(stream.batch(chunk, device), start, stop)
            sizes = [stream.states[i].tensors[0].shape[0] for i in chunk]
            for k, i in enumerate(chunk):
                # stored at once: nothing piles up on the device or in float32
                states[i] = _stored(State(_part(state.tensors, sizes, k), state.meta), dtype)
                sides[i] = _stored(State(_part(side, sizes, k)), dtype)
    return tuple(Stream(found, dtype, stream.numbers) for found in (states, sides))


def split(entries, held_out):
    """Entries for learning and for accepting; the last `held_out` are for accepting."""
    indices = list(entries)
    held_out = min(held_out, len(indices) // 4)
    cut = len(indices) - held_out
    return indices[:cut], indices[cut:] or indices


def _stored(state, dtype):
    return State(tuple(t.detach().to('cpu', dtype or t.dtype) for t in state.tensors), state.meta)


def _kind(state):
    """What states must share to be batched."""
    return tuple(t.shape[1:] for t in state.tensors), state.meta


def _grouped(pairs):
    """Lists of keys with the same value, in order."""
    groups = defaultdict(list)
    for key, value in pairs:
        groups[value].append(key)
    return list(groups.values())


def _part(tensors, sizes, k):
    start = sum(sizes[:k])
    return tuple(t[start:start + sizes[k]] for t in tensors)


def _chunks(indices, size):
    return [indices[i:i + size] for i in range(0, len(indices), size)]
