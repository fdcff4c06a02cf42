"""Batches of what lies on the CPU or on disk, and how they reach the device in time."""
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def collate(entries, device):
    """Tuples of tensors, one an image, as one tuple of batches in float32."""
    return tuple(_joined(parts, torch.device(device)) for parts in zip(*entries))


def _joined(parts, device):
    if device.type != 'cuda' or parts[0].device.type != 'cpu':
        return torch.cat(parts).to(device, torch.float32)
    # from pinned memory a GPU fetches by itself, and half precision is half the way
    first = parts[0]
    form = (torch.channels_last if first.dim() == 4
            and first.is_contiguous(memory_format=torch.channels_last)
            and not first.is_contiguous() else torch.contiguous_format)
    pinned = torch.empty((sum(len(p) for p in parts), *first.shape[1:]), dtype=first.dtype,
                         pin_memory=True, memory_format=form)
    return torch.cat(parts, out=pinned).to(device, non_blocking=True).float()


def looking_ahead(iterable):
    """Yield (item, the one after it), None after the last."""
    iterator = iter(iterable)
    item = next(iterator, None)
    while item is not None:
        following = next(iterator, None)
        yield item, following
        item = following


def side_streams(device):
    """Two streams of a GPU beside the default one: for batches on their way, and for recording.

    They are made together and once, since torch hands out a few streams in turn: others, made
    later, can be the same ones, and what a recording stream is given goes into the graph.
    """
    return _side_streams(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _side_streams(gpu):
    return torch.cuda.Stream(gpu), torch.cuda.Stream(gpu)


def made_ahead(make, items, device):
    """Yield what `make` gives for each item; for a GPU the next is made while one is used.

    Args:
        make (Callable): item -> (result, the tensors of it).
        items (Iterable): gone through in order, for a GPU one ahead.
        device (torch.device): that results are for; for a GPU a thread makes them, in a stream
            of its own. What does not fit into its memory then is made when it is wanted.
    """
    if device.type != 'cuda':
        for item in items:
            yield make(item)[0]
        return
    stream, _ = side_streams(device)
    items, used = iter(items), deque()  # events behind what has been used

    def aside(item):
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):
            try:
                return *make(item), stream.record_event()
            except torch.OutOfMemoryError:
                pass  # out of the handler, or its traceback would keep what did not fit
        return None

    def begin():
        return next(((item, thread.submit(aside, item)) for item in items), None)

    with ThreadPoolExecutor(1) as thread:
        begun = begin()
        while begun is not None:
            item, made = begun[0], begun[1].result()
            using = torch.cuda.current_stream(device)
            if made is None:
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
                result, tensors = make(item)
                begun = begin()
            else:
                begun = begin()
                result, tensors, ready = made
                using.wait_event(ready)
                for tensor in tensors:
                    tensor.record_stream(using)  # its memory is not given away before
            made = tensors = None
            yield result
            result = None
            # else batches pile up where the GPU is behind
            used.append(using.record_event())
            if len(used) > 2:
                used.popleft().synchronize()
