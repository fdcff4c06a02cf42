"""Where the states of streams are kept: in memory up to a limit, beyond it in mapped files."""
import mmap
import os
import tempfile

import torch

from ..errors import FaultError, UsageError
from ..files import is_disk_full, make_writable

_ALIGNMENT = 64  # bytes: of a tensor in a file, as torch aligns its own


class FeatureCache:
    """Keeps states on the CPU, the first in memory and those beyond a limit in files.

    What is kept reads the same from either. The files have no names: their space is free
    again once nobody needs them, and when the process ends, however it ends. Of several
    processes each has a cache of its own.

    Args:
        dtype (torch.dtype | None): storage type of streams; None keeps that of the tensors.
        memory_mb (float | None): MiB that are kept in memory at a time; None is no limit.
        folder (str | Path | None): of the files; None is the system's temporary folder.

    Example:
        >>> shelf = FeatureCache(torch.float16, memory_mb=0).shelf()
        >>> shelf.keep(State((torch.ones(1, 3), ))).tensors
        (tensor([[1., 1., 1.]], dtype=torch.float16),)
    """

    def __init__(self, dtype=None, memory_mb=None, folder=None):
        self.dtype, self.folder = dtype, folder
        self.limit = float('inf') if memory_mb is None else memory_mb * 2**20
        self.held = 0  # bytes in memory

    def check(self):
        """Make the folder, or raise UsageError where nothing can be written there."""
        if self.folder is not None and self.limit < float('inf'):
            make_writable(self.folder, 'quantize_cfg.cache_dir')

    def shelf(self):
        """A place for the states of one stream, in the cache's storage type."""
        return Shelf(self, self.dtype)


class Shelf:
    """States of one stream; its memory and its file are free once none of them is left.

    Args:
        cache (FeatureCache): which it belongs to.
        dtype (torch.dtype | None): storage type; None keeps that of the tensors.
    """

    def __init__(self, cache, dtype=None):
        self.cache, self.dtype = cache, dtype
        self.held, self._file, self._end = 0, None, 0

    def __del__(self):
        self.cache.held -= self.held

    def keep(self, state):
        """Keep a State.

        Returns:
            Kept: the same, on the CPU and in the storage type.

        Raises:
            UsageError: a number is beyond float16.
            FaultError: the disk is full.
        """
        tensors = [t.detach().to(self.dtype or t.dtype) for t in state.tensors]
        if self.dtype == torch.float16 and any(torch.isinf(t).any() for t in tensors):
            raise UsageError(
                "quantize_cfg.cache_dtype='float16' overflows here; use 'bfloat16' or None")
        tensors = tuple(_dense(t.cpu()) for t in tensors)
        size = sum(t.nbytes for t in tensors)
        if size > 0 and self.cache.held + size > self.cache.limit:
            return Kept(self, tensors, state.meta, self._write(tensors))
        self.held += size
        self.cache.held += size
        return Kept(self, tensors, state.meta)

    def _write(self, tensors):
        """Append tensors to the file; returns where each begins."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, dir=self.cache.folder)
            # only at such places can a mapping begin
            self._pad(mmap.ALLOCATIONGRANULARITY)
            places = []
            for tensor in tensors:
                self._pad(_ALIGNMENT)
                places.append(self._end)
                flat = tensor.as_strided((tensor.numel(), ), (1, ))
                self._append(flat.view(torch.uint8).numpy().data)
        except OSError as error:
            if is_disk_full(error):
                raise FaultError(_full_line(error, self.cache.folder)) from None
            raise
        return places

    def _pad(self, multiple):
        self._append(memoryview(bytes(-self._end % multiple)))

    def _append(self, data):
        while data:
            count = os.write(self._file.fileno(), data)
            data, self._end = data[count:], self._end + count

    def ahead(self, start, stop):
        """Let the system read these bytes of the file while something else is done."""
        if hasattr(os, 'posix_fadvise'):
            os.posix_fadvise(
                self._file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def map(self, start, stop):
        """The bytes [start, stop) of the file; the mapping lives as long as its reader.

        It is private: torch warns of memory that it may not write to, though nobody does.
        """
        return mmap.mmap(self._file.fileno(), stop - start, flags=mmap.MAP_PRIVATE,
                         prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start)


class Kept:
    """A State on a shelf; what lies in a file is mapped anew at each look.

    A mapping is gone with its tensors, so no more of a file is in memory than what is
    worked on.

    Args:
        shelf (Shelf): where it is.
        tensors (tuple[Tensor]): dense, on the CPU.
        meta (Any): of the State.
        places (list[int] | None): where each tensor begins in the shelf's file, None where
            they stay in memory.
    """

    __slots__ = ('shelf', 'meta', 'shapes', '_layout', '_tensors')

    def __init__(self, shelf, tensors, meta, places=None):
        self.shelf, self.meta = shelf, meta
        self.shapes = tuple(t.shape for t in tensors)
        self._tensors, self._layout = tensors, None
        if places is not None:
            self._tensors = None
            self._layout = [(place, t.dtype, t.stride()) for place, t in zip(places, tensors)]

    @property
    def rows(self):
        """Rows of the first tensor."""
        return self.shapes[0][0]

    @property
    def tensors(self):
        """tuple[Tensor]: not to be written to."""
        if self._layout is None:
            return self._tensors
        begin, stop = self._span()
        data = self.shelf.map(begin, stop)
        return tuple(
            torch.frombuffer(data, dtype=dtype, count=shape.numel(), offset=place - begin)
            .as_strided(shape, stride) if shape.numel() else torch.empty(shape, dtype=dtype)
            for shape, (place, dtype, stride) in zip(self.shapes, self._layout))

    def ahead(self):
        """It will be looked at soon."""
        if self._layout is not None:
            self.shelf.ahead(*self._span())

    def _span(self):
        place, dtype, _ = self._layout[-1]
        return self._layout[0][0], place + self.shapes[-1].numel() * dtype.itemsize


def _dense(tensor):
    """The tensor with its strides where it fills its memory, else a contiguous copy.

    Strides stay what they are, since kernels choose their way by them.
    """
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    return tensor if span == tensor.numel() else tensor.contiguous()


def _full_line(error, folder):
    return (f'the feature cache in {folder or tempfile.gettempdir()} cannot be written: '
            f'{os.strerror(error.errno)}; free some space, give quantize_cfg.cache_dir on another '
            'disk, or raise quantize_cfg.cache_memory_mb, and run the same command with --resume: '
            'what was saved before is whole')
