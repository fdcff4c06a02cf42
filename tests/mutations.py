"""Random edits of configs and random damage to files, for whoever draws at random.

What draws is an object with `of(items)` and `number(low, high)`: hypothesis in
tests/properties, a random.Random in tools/dev/damage_test.py.
"""
import copy
import io

import torch
from demo_runs import QUICK, TINY

# A run of tools/quant.py that takes seconds: the neck's leaves, one step each.
OPTIONS = (
    *TINY, *QUICK[:-1], 'quantize_cfg.calibration.method=minmax', 'quantize_cfg.parts=[neck]',
    'quantize_cfg.calibration.images=4', 'quantize_cfg.calibration.held_out=1',
    'quantize_cfg.calibration.search_images=2', 'quantize_cfg.calibration.rows=64',
    'quantize_cfg.reconstruction.iters=1', 'quantize_cfg.head_reconstruction.iters=1',
    'quantize_cfg.head_reconstruction.per_level.leaf.iters=1')


class Odd(float):
    """NaN and Inf, written as Python reads them."""

    def __repr__(self):
        return f"float('{float(self)}')"


# No large numbers: a run of a million steps is what such a config asks for.
JUNK = (None, True, False, -1, 0, 1, 3, 2.5, -0.5, Odd('nan'), Odd('inf'), '', 'x', 'none',
        [], [1], ['x'], [None], {}, {'x': 1}, {'type': 'Nothing'}, [[]], 'leaf', '*')
OURS = ('model.quant', 'quantize_cfg', 'quantize_hooks')
# Where things lie, and what only training reads.
LEFT_OUT = ('work_dir', 'load_from', 'data_root', 'backend_args', 'param_scheduler', 'filename',
            'optim_wrapper', 'train_pipeline', 'test_pipeline', 'auto_scale_lr', 'val_',
            'model.train_cfg', 'train_cfg')

# Damage to the bytes of a file, and to the tensors of one that is whole.
BYTES = ('cut', 'flip', 'flips', 'zeros', 'insert')
STATE = ('dtype', 'shape', 'delete', 'foreign', 'no tensor')


def write_config(path, cfg):
    """Write plain data as a config file."""
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in cfg.items()))
    return path


def wants_report(cfg):
    """Whether a hook that writes report.json is left in a config."""
    return 'pfcr_mm.ReportHook' in repr(cfg.get('quantize_hooks'))


def places(value, path=()):
    """All keys of nested data, as tuples."""
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def edit(cfg, draw):
    """One or two random edits.

    Args:
        cfg (dict): plain data, left as it is.
        draw (object): see the module.

    Returns:
        tuple[list[str], dict]: what was done, edited config.
    """
    cfg = copy.deepcopy(cfg)
    known = [p for p in places(cfg) if not any(
        '.'.join(map(str, p)).startswith(k) or str(p[-1]).startswith(k) for k in LEFT_OUT)]
    ours = [p for p in known if '.'.join(map(str, p)).startswith(OURS)]
    done = []
    for _ in range(draw.number(1, 2)):
        *path, key = draw.of(ours if draw.number(0, 1) else known)
        parent = cfg
        try:
            for step in path:
                parent = parent[step]
            value = parent[key]
        except (KeyError, IndexError, TypeError):
            continue  # gone by the edit before
        kind = draw.of(['value', 'value', 'value', 'delete', 'rename', 'wrap'])
        if kind == 'delete':
            del parent[key]
        elif kind == 'rename' and isinstance(parent, dict):
            parent[f'{key}s'] = parent.pop(key)
        elif kind == 'wrap':
            parent[key] = [value]
        else:
            parent[key] = value = copy.deepcopy(draw.of(JUNK))
        done.append(f"{kind} {'.'.join(map(str, (*path, key)))} {value!r:.40}")
    return done, cfg


def harm(kinds, draw):
    """Random damage to a file.

    Args:
        kinds (Sequence[str]): names of files to choose of.
        draw (object): see the module.

    Returns:
        tuple[str, str, callable]: which file, name of the damage, function of its bytes.
    """
    kind = draw.of(kinds)
    name = draw.of(BYTES + STATE)
    if kind.endswith('safetensors') and name in STATE:
        name = 'flip'
    place, number = draw.number(0, 9999) / 10000, draw.number(1, 255)
    return kind, name, lambda content: _harmed(content, name, place, number)


def _harmed(content, name, place, number):
    if name in STATE:
        return _harmed_state(content, name, place, number)
    position = int(place * len(content))
    changed = bytearray(content)
    if name == 'cut':
        return content[:position]
    if name == 'flip':
        changed[position] ^= number
    elif name == 'flips':
        for k in range(number):
            changed[(position + 7919 * k) % len(changed)] ^= 1 + k % 255
    elif name == 'zeros':
        changed[position:position + 64 * number] = bytes(
            len(changed[position:position + 64 * number]))
    else:
        changed[position:position] = bytes([number]) * number
    return bytes(changed)


def _harmed_state(content, name, place, number):
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    state = loaded['model']['tensors'] if 'model' in loaded else loaded['state_dict']
    keys = [k for k, v in state.items() if v.numel() and not k.endswith('position_index')]
    key = keys[int(place * len(keys))]
    if name == 'dtype':
        kinds = (torch.int64, torch.complex64, torch.bool, torch.float64, torch.int8)
        state[key] = state[key].to(kinds[number % 5])
    elif name == 'shape':
        state[key] = state[key].flatten()[:-1] if number % 2 else state[key][None]
    elif name == 'delete':
        del state[key]
    elif name == 'foreign':
        state[f'backbone.foreign{number}.weight'] = torch.ones(number)
    else:
        state[key] = [1, 'x', None, {}][number % 4]
    buffer = io.BytesIO()
    torch.save(loaded, buffer)
    return buffer.getvalue()
