"""Whether the tensors of a checkpoint fit a detector: names, shapes, types, values.

All but values is known before anything is allocated (see `archive`).
"""
import re

import torch

from ..errors import UsageError
from ..modules import QuantLayer
from ..quantizers import Quantizer, TokenQuantizer
from .head_folds import BUFFERS
from .manifest import UNREACHED

# Buffers that the model computes by itself.
DERIVED = re.compile(r'.*\.relative_position_index$')
# Buffers that conversion adds: what folds and calibration move.
MOVED = ('.pad_value', '.left_centre', *(f'.{name}' for name in BUFFERS))


def check_float_values(own, state, path):
    """Raise UsageError where a float weight is not a finite float tensor."""
    for key, value in state.items():
        if key not in own or not own[key].is_floating_point():
            continue
        if not value.is_floating_point():
            raise UsageError(
                f'checkpoint {path} has {key!r} as {value.dtype}, which is no float type')
        if not value.is_meta and not torch.isfinite(value).all():
            raise UsageError(f'checkpoint {path} has NaN or Inf in {key!r}')


def check_quantized_state(detector, manifest, state, path):
    """Raise UsageError unless a quantized state is all that `detector` needs and no more.

    Args:
        detector (nn.Module): built from the config, of the manifest.
        manifest (dict): see `build_manifest`.
        state (dict[str, Tensor]): on any device, 'meta' included.
        path (str | Path): to be named in errors.
    """
    wanted = _wanted(detector, manifest)
    for key in state:
        if key not in wanted:
            raise UsageError(f'checkpoint {path} has {key!r}, which the config does not make')
    for key, (dtype, shape, needed) in wanted.items():
        value = state.get(key)
        if value is None:
            if needed:
                raise UsageError(f'checkpoint {path} is damaged: it lacks {key!r}')
            continue
        if tuple(value.shape) != shape:
            raise UsageError(
                f'checkpoint {path} is for another architecture: it has {key!r} as '
                f'{tuple(value.shape)} where the config makes {shape}')
        if value.dtype != dtype and not (  # zero points need not be integers
                key.endswith('.zero_point') and value.dtype == torch.float32):
            raise UsageError(
                f'checkpoint {path} is damaged: {key!r} is {value.dtype}, not {dtype}')
        if value.is_meta or not value.is_floating_point():
            continue
        if not torch.isfinite(value).all() or (
                key.endswith('.log_scale') and (value.abs() > 80).any()) or (
                key.endswith('.steps_per_octave') and (value <= 0).any()):
            raise UsageError(f'checkpoint {path} has NaN, Inf or impossible scales in {key!r}')


def _wanted(detector, manifest):
    """(dtype, shape, whether it must be there) of every key of a quantized state."""
    wanted = {key: (value.dtype, tuple(value.shape), True)
              for key, value in detector.state_dict().items() if not DERIVED.match(key)}
    modules = dict(detector.named_modules(remove_duplicate=False))  # some have two names
    unreached = {modules.get(layer['name']) for layer in manifest['layers']
                 if layer['skipped_reason'] == UNREACHED}
    for name, module in modules.items():
        if isinstance(module, QuantLayer):
            dtype, _, needed = wanted.pop(f'{name}.weight')
            size = -(-module.weight.numel() * module.weight_quantizer.bits // 8)
            wanted[f'{name}.weight_packed'] = (torch.uint8, (size, ), needed)
    for name, quantizer in modules.items():
        if not isinstance(quantizer, Quantizer):
            continue
        layer, _, kind = name.rpartition('.')
        needed = kind == 'weight_quantizer' or (
            modules[layer] not in unreached and not isinstance(quantizer, TokenQuantizer))
        for key in quantizer.state_keys:
            dtype = torch.uint8 if key == 'zero_point' else torch.float32
            wanted[f'{name}.{key}'] = (dtype, tuple(getattr(quantizer, key).shape), needed)
    return wanted
