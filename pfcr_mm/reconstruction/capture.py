"""Streams: what flows through a chain, image by image, at the boundaries of units."""
import logging
from collections import defaultdict

import torch
from mmengine.logging import print_log

from ..errors import UsageError
from ..models.chain import State
from .faults import BatchLimit


class Stream:
    """One State an image, kept on the CPU; batches are drawn among equal shapes.

    Args:
        states (list[State]): one an image.
        dtype (torch.dtype | None): storage type of floating tensors; None keeps it.
    """

    def __init__(self, states, dtype=None):
        self.states = [_stored(state, dtype) for state in states]
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
        groups = defaultdict(list)
        for i, state in enumerate(self.states):
            groups[(tuple(t.shape[1:] for t in state.tensors), state.meta)].append(i)
        return list(groups.values())


@torch.no_grad()
def advance(chain, stream, start, stop, device, batch_size=8, dtype=None):
    """Run leaves [start, stop) over a stream.

    Returns:
        tuple[Stream, Stream]: the states after `stop`, and the side outputs on the way.
    """
    limit = BatchLimit(batch_size, f'{chain.name} between its units', _log)
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
    return Stream(states, dtype), Stream(sides, dtype)


def split(stream, held_out):
    """Indices for learning and for accepting; the last `held_out` entries are for accepting."""
    indices = list(range(len(stream)))
    held_out = min(held_out, len(indices) // 4)
    cut = len(indices) - held_out
    return indices[:cut], indices[cut:] or indices


def _stored(state, dtype):
    return State(tuple(t.detach().to('cpu', dtype or t.dtype) for t in state.tensors), state.meta)


def _part(tensors, sizes, k):
    start = sum(sizes[:k])
    return tuple(t[start:start + sizes[k]] for t in tensors)


def _chunks(indices, size):
    return [indices[i:i + size] for i in range(0, len(indices), size)]
