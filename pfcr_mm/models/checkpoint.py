"""Checkpoints: safe reading, float and quantized loading, packed saving."""
import hashlib
import io
import os
import re
from pathlib import Path

import torch
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict

from ..errors import UsageError
from ..files import write_atomically
from ..modules import QuantLayer
from .fit import DERIVED, MOVED, check_float_values, check_quantized_state
from .fold import fold_state
from .manifest import FORMAT, build_manifest
from .official_swin import from_official_swin, is_official_swin
from .safetensors import read_safetensors, save_safetensors
from .safety import load_weights, look
from .timm_names import timm_weights

ASSETS = Path(__file__).parents[1] / 'assets'
_ASSET_SCHEME = 'pfcr_mm://'
_TIMM_SCHEME = 'timm://'
# Keys of `quant` that say, beside the bits, what codes and scales mean, and what is folded.
_MEANING = ('weight_symmetric', 'activation_symmetric', 'softmax', 'post_gelu',
            'class_tokens', 'matmul_granularity', 'balance_values', 'centre_heads', 'rotate_heads',
            'centre_queries')
# What files say that are older than a key.
_BEFORE = dict(class_tokens='shared', balance_values=False, centre_heads=False, rotate_heads=False,
               centre_queries=False)


def read_checkpoint(path, trust=False, check=None):
    """Read a checkpoint without executing what it may carry.

    Args:
        path (str): a file of torch.save or a .safetensors, an http(s) URL, 'pfcr_mm://NAME'
            for a file that ships with this package, or 'timm://MODEL' for weights that timm
            downloads.
        trust (bool): True runs arbitrary pickled code; only for own files.
        check (callable | None): called with the checkpoint before its tensors are
            allocated; they are on the 'meta' device then.

    Returns:
        dict: with a 'state_dict'.

    Raises:
        UsageError: missing, damaged, or in need of pickle.
    """
    if str(path).startswith(_TIMM_SCHEME):
        return dict(meta={}, state_dict=timm_weights(str(path)[len(_TIMM_SCHEME):]))
    if str(path).startswith(_ASSET_SCHEME):
        path = str(ASSETS / str(path)[len(_ASSET_SCHEME):])
    if re.match(r'https?://', str(path)):
        local = _download(path)
    else:
        local = os.path.expanduser(path)
    if not os.path.isfile(local):
        raise UsageError(f'checkpoint {path} is not there; give the path of a .pth file')
    if str(local).endswith('.safetensors'):
        return read_safetensors(local, check)
    if check is not None and not trust:
        check(_normal(look(local, path), path))
    return _normal(load_weights(local, path, trust), path)


def _normal(checkpoint, path):
    """A checkpoint as a dict with a 'state_dict' of tensors and a 'meta'."""
    if not isinstance(checkpoint, dict):
        raise UsageError(f'checkpoint {path} holds no state dict')
    if isinstance(checkpoint.get('model'), dict):  # training files of MAE, DeiT, Swin
        checkpoint = dict(checkpoint['model'])
    if not isinstance(checkpoint.get('state_dict'), dict):
        if not checkpoint or not all(torch.is_tensor(v) for v in checkpoint.values()):
            raise UsageError(f'checkpoint {path} holds no state dict')
        checkpoint = dict(meta={}, state_dict=checkpoint)
    for key, value in checkpoint['state_dict'].items():
        if not isinstance(key, str) or not torch.is_tensor(value):
            raise UsageError(f'checkpoint {path}: {key!r} of its state dict is no tensor')
    if not isinstance(checkpoint.get('meta') or {}, dict):
        checkpoint = dict(checkpoint, meta={})
    return checkpoint


def manifest_of(checkpoint):
    """The manifest of a quantized checkpoint, or None for a float one."""
    manifest = (checkpoint.get('meta') or {}).get('pfcr_mm')
    if manifest is not None and not isinstance(manifest, dict):
        raise UsageError('the manifest of the checkpoint is damaged')
    if manifest is not None and manifest.get('format') != FORMAT:
        raise UsageError(
            f"checkpoint format {manifest.get('format')!r} is not {FORMAT!r}; "
            'it was written by another version of pfcr_mm')
    return manifest


def load_float(detector, checkpoint, path):
    """Load float weights into a quantized detector; every float weight must be there.

    Takes mmdet's names and those of the official Swin detectors.

    Raises:
        UsageError: the file is quantized already, or of another architecture.
    """
    state = check_float(detector, checkpoint, path)
    detector.wants_float = True
    detector.load_state_dict(state, strict=False)
    detector.wants_float = False


def check_float(detector, checkpoint, path):
    """The float weights of a checkpoint under the detector's names.

    Raises:
        UsageError: see `load_float`.
    """
    if manifest_of(checkpoint) is not None:
        raise UsageError(
            f'checkpoint {path} is quantized already; give the float checkpoint it came from')
    state = {re.sub(r'^module\.', '', k): v for k, v in checkpoint['state_dict'].items()}
    if hasattr(detector, 'own_names'):  # it knows more than one naming
        state = detector.own_names(state)
    own = detector.state_dict()
    if is_official_swin(state) and not is_official_swin(own):
        state = from_official_swin(state)
    fold_state(state, detector.folded)
    if not own.keys() & state.keys():
        raise UsageError(
            f"checkpoint {path} fits neither mmdet's naming of this detector nor that of the "
            f'official Swin checkpoints: its keys are like {next(iter(state), None)!r}')
    created = _created_keys(detector)
    missing = [k for k in own if k not in state and k not in created and not DERIVED.match(k)]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    parts = dict(detector.named_children())
    extra = [k for k in state
             if k not in own and k.endswith('.weight') and k.partition('.')[0] in parts]
    if missing or wrong or extra:
        if missing:
            what = f'lacks {len(missing)} weights, such as {missing[0]!r}'
        elif wrong:
            what = (f'has {wrong[0]!r} as {tuple(state[wrong[0]].shape)} where the config makes '
                    f'{tuple(own[wrong[0]].shape)}')
        else:
            what = f'has weights that the config does not make, such as {extra[0]!r}'
        raise UsageError(f'checkpoint {path} is for another architecture: it {what}')
    check_float_values(own, state, path)
    return state


def load_quantized(detector, checkpoint, path):
    """Load a quantized checkpoint into a detector built from the same `quant` config.

    Raises:
        UsageError: the file is float, or was quantized otherwise.
    """
    check_quantized(detector, checkpoint, path)
    try:
        load_state_dict(detector, checkpoint['state_dict'], strict=False, logger='silent')
    except UsageError as error:
        raise UsageError(f'checkpoint {path} is for another architecture: {error}') from None


def check_quantized(detector, checkpoint, path):
    """Raise UsageError where `load_quantized` would, tensors without memory included."""
    manifest = manifest_of(checkpoint)
    if manifest is None:
        raise UsageError(
            f'checkpoint {path} holds float weights; quantize it first with tools/quant.py')
    try:
        check_manifest(detector, manifest, path)
        check_quantized_state(detector, manifest, checkpoint['state_dict'], path)
    except (KeyError, TypeError, AttributeError) as error:  # not what build_manifest makes
        raise UsageError(f'the manifest of checkpoint {path} is damaged: {error!r}') from None


def _options(key, saved, own):
    """What makes the entry `key` of `quant` what it was: --cfg-options in a line."""
    if not isinstance(saved, dict) or not isinstance(own, dict):
        return f'model.quant.{key}={saved}'
    return ' '.join(f'model.quant.{key}.{part}={value}' for part, value in saved.items()
                    if own.get(part) != value)


def check_manifest(detector, manifest, path='the checkpoint'):
    """Raise UsageError unless `detector` has the layers, bits and quantizers of the manifest."""
    own = detector.quant_config.as_dict()
    older = [key for key in _BEFORE if key not in manifest['quant'] and own[key] != _BEFORE[key]]
    if older:
        options = ' '.join(f'model.quant.{key}={_BEFORE[key]}' for key in older)
        raise UsageError(f'{path} is older than quant.{older[0]}; load it with {options}')
    saved = {layer['name']: layer for layer in manifest['layers']}
    built = {layer['name']: layer for layer in build_manifest(detector)['layers']}
    for name in {**saved, **built}:
        if name not in saved or name not in built:
            raise UsageError(
                f'{path} is for another architecture: layer {name!r} is only in the '
                f"{'checkpoint' if name in saved else 'config'}")
        for key in ('weight_bits', 'activation_bits'):
            if saved[name][key] != built[name][key]:
                raise UsageError(
                    f'{path} has {key}={saved[name][key]} for {name}, the config says '
                    f'{built[name][key]}; use the config it was quantized with')
    for key in _MEANING:
        saved = manifest['quant'].get(key, _BEFORE.get(key))
        if saved != own[key]:
            raise UsageError(
                f'{path} has quant.{key}={saved!r}, the config says {own[key]!r}; use the config '
                f'it was quantized with, or say {_options(key, saved, own[key])}')


def save_quantized(detector, path, meta):
    """Write `path`, and the same as .safetensors beside it.

    Weights as packed integers, scales, float remainder, manifest.

    All tensors of one type share one storage, so that the file is as small as its
    numbers. Written to a temporary file, synced, then renamed.

    Args:
        detector (nn.Module): hardened.
        path (str | Path): where to.
        meta (dict): plain data that goes in beside the manifest.

    Returns:
        int: size of `path` in bytes.
    """
    state, meta = quantized_state(detector), dict(meta, pfcr_mm=build_manifest(detector))
    size = save_atomically(dict(meta=meta, state_dict=share_storage(state)), path)
    save_safetensors(state, meta, Path(path).with_suffix('.safetensors'))
    return size


def quantized_state(detector):
    """The state dict of a hardened detector, weights as packed integers."""
    state = {k: v for k, v in detector.state_dict().items() if not DERIVED.match(k)}
    packed = {m: m.packed_weight() for m in detector.modules()
              if isinstance(m, QuantLayer) and m.hardened}
    for name, module in detector.named_modules(remove_duplicate=False):
        if module in packed:
            state[f'{name}.weight_packed'] = packed[module]
            del state[f'{name}.weight']
    # zero points are integers from 0 to 255, unless `quant.integer_zero_point` is off
    return {k: v.to(torch.uint8) if k.endswith('.zero_point') and torch.equal(v, v.round()) else v
            for k, v in state.items()}


def save_atomically(content, path):
    """`torch.save` to a temporary file, synced, then renamed to `path`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return write_atomically(path, buffer.getbuffer())


def share_storage(state):
    """The same tensors as views of one flat tensor a dtype; what is shared stays shared."""
    views = {}
    for dtype in {v.dtype for v in state.values()}:
        keys = [k for k, v in state.items() if v.dtype == dtype]
        unique = {_place(state[k]): state[k] for k in keys}
        flat = torch.cat([v.detach().cpu().flatten() for v in unique.values()])
        parts = flat.split([v.numel() for v in unique.values()])
        found = {place: part.view(v.shape) for (place, v), part in zip(unique.items(), parts)}
        views.update({k: found[_place(state[k])] for k in keys})
    return {key: views[key] for key in state}


def _place(tensor):
    """Equal for tensors that are one and the same memory; empty tensors have none."""
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()


def _created_keys(detector):
    """State that conversion adds and a float checkpoint cannot have."""
    return detector.created_biases | {
        key for key in detector.state_dict() if '_quantizer.' in key or key.endswith(MOVED)}


def _download(url):
    """Fetch a URL into torch's hub cache (once) and return the file."""
    from torch.hub import download_url_to_file, get_dir
    folder = Path(get_dir()) / 'checkpoints'
    # names like epoch_12.pth are no names: tell URLs apart
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.rpartition('/')[2]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(url, str(target))
        except OSError as error:
            raise UsageError(
                f'checkpoint {url} cannot be downloaded ({error}); fetch it by other means and '
                'give its path as CHECKPOINT') from None
    return str(target)


@CheckpointLoader.register_scheme(prefixes=_ASSET_SCHEME)
def _load_asset(filename, map_location=None, **_):
    return read_checkpoint(filename)
