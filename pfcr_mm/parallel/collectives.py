"""What processes say to each other. Every process must make the same calls in one order.

What leads to a decision (a loss, a stop, statistics) comes out the same to the bit in all
processes, so that they decide alike.
"""
import torch
from mmengine.dist import get_rank, get_world_size
from torch import distributed

_BUCKET = 2**25  # numbers that one reduction carries at most


def rank():
    """Number of this process; 0 is the one that writes."""
    return get_rank()


def world_size():
    """Number of processes."""
    return get_world_size()


def is_main():
    """Whether this process writes files and lines."""
    return rank() == 0


def gather(value):
    """Everyone's value (anything that pickles), by rank."""
    if world_size() == 1:
        return [value]
    found = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


def from_main(make):
    """What `make()` gives in the main process, which alone calls it."""
    if world_size() == 1:
        return make()
    box = [make() if is_main() else None]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def total(value):
    """The sum of everyone's value, added up by rank: a number or a tensor; 0 for nothing."""
    first, *others = gather(value)
    return sum(others, start=first)


def highest(number):
    """The largest of everyone's integers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


@torch.no_grad()
def sum_in_place(tensors):
    """Sum tensors over all processes, in few large messages."""
    if world_size() == 1:
        return
    for bucket in _buckets(tensors):
        _over_flat(bucket, distributed.all_reduce)


@torch.no_grad()
def copy_from_main(tensors):
    """Overwrite tensors with those of the main process."""
    if world_size() == 1:
        return
    for bucket in _buckets([t.data for t in tensors]):
        _over_flat(bucket, lambda flat: distributed.broadcast(flat, 0))


def _buckets(tensors):
    """Lists of tensors of one type and device that go together in a message."""
    open_buckets, full = {}, []
    for tensor in tensors:
        key = (tensor.dtype, tensor.device)
        bucket = open_buckets.setdefault(key, [])
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            full.append(bucket)
            bucket = open_buckets[key] = []
        bucket.append(tensor)
    return full + list(open_buckets.values())


def _over_flat(tensors, function):
    flat = torch.cat([t.reshape(-1) for t in tensors])
    function(flat)
    for tensor, found in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(found.view_as(tensor))
