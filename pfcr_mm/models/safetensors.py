"""Checkpoints as safetensors: tensors and one line of JSON, nothing that could run.

The format has no checksums, so ours carry one of their own.
"""
import hashlib
import json

import torch

from ..errors import UsageError
from ..files import write_atomically

_KEY = 'pfcr_mm'  # one key alone: the order of several is not fixed


def save_safetensors(state, meta, path):
    """Write tensors and plain data; the same input gives the same bytes.

    Args:
        state (dict[str, Tensor]): tensors by name.
        meta (dict): data that JSON has.
        path (str | Path): where to.

    Returns:
        int: size in bytes.
    """
    from safetensors.torch import save
    state = {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}
    text = json.dumps(dict(meta=meta, sha256=_digest(state, meta)), sort_keys=True)
    return write_atomically(path, save(state, {_KEY: text}))


def read_safetensors(path, check=None):
    """Read a safetensors file, of ours or of others.

    Args:
        path (str | Path): the file.
        check (callable | None): called with the checkpoint before its tensors are
            allocated; they are on the 'meta' device then.

    Returns:
        dict: 'state_dict' and 'meta' (empty in files of others).

    Raises:
        UsageError: damaged, or whatever `check` raises.
    """
    from safetensors import safe_open
    try:
        with safe_open(str(path), framework='pt') as file:
            ours = json.loads((file.metadata() or {}).get(_KEY, '{}'))
            meta = ours.get('meta', {})
            if check is not None:
                check(dict(meta=meta, state_dict={
                    k: torch.empty(s.get_shape(), dtype=_DTYPES[s.get_dtype()], device='meta')
                    for k, s in ((k, file.get_slice(k)) for k in file.keys())}))
            state = {k: file.get_tensor(k) for k in file.keys()}
        if ours and ours.get('sha256') != _digest(state, meta):
            raise ValueError('wrong checksum')
    except UsageError:
        raise
    except Exception as error:  # the library raises its own
        raise UsageError(
            f'checkpoint {path} cannot be read (damaged or cut off?): {error}') from None
    return dict(meta=meta, state_dict=state)


_DTYPES = dict(
    F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
    I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


def _digest(state, meta):
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name]
        digest.update(f'{name} {value.dtype} {tuple(value.shape)} '.encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
