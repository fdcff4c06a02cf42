"""A look into a checkpoint file before anything in it is allocated or executed.

torch compares no checksums, older versions believe the sizes that a file declares, and
a zip archive may unfold to any size. `peek` reads the structure alone: tensors come
back on the 'meta' device, with shape and type and without memory; objects of other
classes come back as inert stand-ins, whatever their pickle would have called.
"""
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import torch

_MAGIC = 0x1950a86a20f9469cfc6c  # of files that torch wrote before 1.6
_STORAGES = dict(
    DoubleStorage=torch.float64, FloatStorage=torch.float32, HalfStorage=torch.float16,
    BFloat16Storage=torch.bfloat16, LongStorage=torch.int64, IntStorage=torch.int32,
    ShortStorage=torch.int16, CharStorage=torch.int8, ByteStorage=torch.uint8,
    BoolStorage=torch.bool, ComplexDoubleStorage=torch.complex128,
    ComplexFloatStorage=torch.complex64, UntypedStorage=torch.uint8)


def peek(path):
    """The contents of a file of torch.save, tensors without memory.

    Args:
        path (str | Path): the file.

    Returns:
        Any: what torch.load would return.

    Raises:
        ValueError: the file is damaged, cut off, or says of itself what is not so.
    """
    try:
        if zipfile.is_zipfile(path):
            return _peek_zip(path)
        return _peek_legacy(path)
    except ValueError:
        raise
    except Exception as error:  # pickle and zip raise all kinds
        raise ValueError(f'{type(error).__name__}: {error}') from None


def _peek_zip(path):
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError('the archive is compressed, which torch never does')
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError('the archive declares more bytes than the file has')
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f'wrong checksum of {damaged}')
        root = next((e.filename for e in entries if e.filename.endswith('/data.pkl')), None)
        if root is None:
            raise ValueError('the archive holds no data.pkl')
        with archive.open(root) as file:
            reader = _Peek(file)
            content = reader.load()
        sizes = {entry.filename: entry.file_size for entry in entries}
        for storage in reader.storages:
            name = f'{root[:-len("data.pkl")]}data/{storage.key}'
            if sizes.get(name) != storage.count * storage.dtype.itemsize:
                raise ValueError(f'storage {storage.key} has not the size that is declared')
    return content


def _peek_legacy(path):
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        if _Peek(file).load() != _MAGIC:
            raise ValueError('torch has not written it')
        _Peek(file).load(), _Peek(file).load()  # protocol, system
        reader = _Peek(file)
        content = reader.load()
        rest = size - file.tell()
    roots = {storage.key: storage for storage in reader.storages}
    if sum(s.count * s.dtype.itemsize for s in roots.values()) > rest:
        raise ValueError('it declares more bytes than the file has')
    return content


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    count: int


class _Inert:
    """Stands in for any class and function; does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        return None

    __setstate__ = __setitem__ = append = extend = add = update = _nothing

    def __call__(self, *args, **kwargs):
        return _Inert()


class _Peek(pickle._Unpickler):
    """Python's own unpickler (the one in C believes any memo index), without imports."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = []

    def find_class(self, module, name):
        """Only what makes up plain data; everything else is inert."""
        if (module, name) == ('collections', 'OrderedDict'):
            return OrderedDict
        if module == 'torch._utils' and name.startswith('_rebuild_tensor'):
            return self._tensor
        if module == 'torch._utils' and name.startswith('_rebuild_parameter'):
            return lambda data, *_: data
        if module in ('torch', 'torch.storage') and name in _STORAGES:
            return _STORAGES[name]
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ('torch', 'Size'):
            return tuple
        return type(name, (_Inert, ), {})

    def persistent_load(self, pid):
        """Take note of a storage."""
        if not isinstance(pid, tuple) or pid[0] != 'storage':
            return _Inert()
        _, dtype, key, _, count, *_ = pid
        if not isinstance(dtype, torch.dtype) or not _is_size(count):
            raise ValueError('a storage has no type or size')
        self.storages.append(_Storage(str(key), dtype, count))
        return self.storages[-1]

    def _tensor(self, storage, offset, size, stride, *rest):
        dtype = next((r for r in rest if isinstance(r, torch.dtype)), storage.dtype)
        if not all(_is_size(n) for n in (offset, *size, *stride)) or len(size) != len(stride):
            raise ValueError('a tensor has no legal shape')
        count = storage.count * storage.dtype.itemsize // dtype.itemsize
        if math.prod(size) and offset + sum((n - 1) * s for n, s in zip(size, stride)) >= count:
            raise ValueError('a tensor reaches beyond its storage')
        return torch.empty(tuple(size), dtype=dtype, device='meta')


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48
