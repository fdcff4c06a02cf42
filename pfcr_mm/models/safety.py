"""Reading files of unknown origin: no code of theirs runs, whoever opens them."""
import os
import pickle
import zipfile
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer

from ..errors import UsageError
from .archive import peek


def _history_method(owner, name):
    """Stands in for `getattr` while unpickling: only HistoryBuffer's own methods."""
    if owner is not HistoryBuffer or name not in ('mean', 'min', 'max', 'current'):
        raise ValueError(f'a checkpoint may not look up {name!r}')
    return getattr(owner, name)


# What MMEngine's own training checkpoints hold besides tensors: plain numbers.
_HARMLESS = [
    HistoryBuffer, (_history_method, 'builtins.getattr'), np.ndarray, np.dtype,
    np._core.multiarray._reconstruct, np._core.multiarray.scalar,
    *(type(np.dtype(name)) for name in ('float64', 'float32', 'int64'))
]
_TORCH_LOAD = torch.load


def load_weights(path, name=None, trust=False):
    """`torch.load` of a file, without executing anything and with all sizes checked.

    Args:
        path (str | Path): the file.
        name (str | None): what to call it in errors.
        trust (bool): True runs arbitrary pickled code.

    Raises:
        UsageError: damaged, or in need of pickle.
    """
    name = name or path
    try:
        if trust:
            return _TORCH_LOAD(path, map_location='cpu', weights_only=False)
        peek(path)
        return _load_only_weights(path)
    except pickle.UnpicklingError as error:
        raise (_holds_objects(name) if 'GLOBAL' in str(error) else _damaged(name, error)) from None
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises all kinds
        raise _damaged(name, error) from None


def look(path, name):
    """`peek` at a file, which may hold no objects either; raises UsageError."""
    try:
        found = peek(path)
        if zipfile.is_zipfile(path):
            with torch.serialization.safe_globals(_HARMLESS):
                objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if objects:
                raise _holds_objects(name)
    except UsageError:
        raise
    except Exception as error:
        raise _damaged(name, error) from None
    return found


@contextmanager
def only_weights(trust=False):
    """Make `torch.load` safe for all code within the block.

    MMEngine falls back to full unpickling where safe loading fails, and torch.hub, which
    it downloads with, does not even try. Within this block both get the safe one.

    Args:
        trust (bool): True leaves all as it is.
    """
    if trust:
        yield
        return
    before, torch.load = torch.load, _guarded_load
    try:
        yield
    finally:
        torch.load = before


def _guarded_load(f, map_location=None, pickle_module=None, *, weights_only=None, mmap=None,
                  **kwargs):
    if isinstance(f, (str, os.PathLike)) and os.path.isfile(f):
        load_weights(f)
    try:
        return _load_only_weights(f, map_location, mmap=mmap)
    except pickle.UnpicklingError:
        raise _holds_objects('in memory') from None


def _load_only_weights(f, map_location='cpu', mmap=None):
    with torch.serialization.safe_globals(_HARMLESS):
        return _TORCH_LOAD(f, map_location=map_location, weights_only=True, mmap=mmap)


def _holds_objects(name):
    return UsageError(
        f'checkpoint {name} holds Python objects besides tensors; if you trust it, '
        'add --trust-checkpoint (trust_checkpoint=True in the config)')


def _damaged(name, error):
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UsageError(f'checkpoint {name} cannot be read (damaged or cut off?): {lines[0]}')
