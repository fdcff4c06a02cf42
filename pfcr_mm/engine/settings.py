"""What a `quantize_cfg` may say: checked before any work, every mistake in one line."""
import torch

from ..errors import UsageError, check_keys, is_number
from ..models.whole import WHOLE
from ..reconstruction import POSConfig, UnitConfig
from ..reconstruction.calibrate import METHODS
from ..reconstruction.faults import ON_NONFINITE
from ..reconstruction.units import check_levels

_CALIBRATION = dict(
    images=256, held_out=32, search_images=32, method='output', rounds=2, rows=4096,
    dataset=None, views=1, cutmix=0.0, retargeted=0.0, compensate=None, feed_back=False,
    fit_norms=False)
_ROIS = dict(proposals=64, detections=16)
_EVALUATE = dict(float=True, calibrated=True, val=False)


def calibration_of(given):
    """`calibration` with its defaults."""
    found = _known(_CALIBRATION, given, 'calibration')
    if found['method'] not in METHODS:
        raise UsageError(
            f"quantize_cfg.calibration.method={found['method']!r} is not known; "
            f'choose one of {METHODS}')
    strength = found['compensate']
    if strength is not None and not (is_number(strength) and strength > 0):
        raise UsageError(f'quantize_cfg.calibration.compensate={strength!r} is neither None nor '
                         'a number above 0')
    for key in ('cutmix', 'retargeted'):
        if not (is_number(found[key]) and 0 <= found[key] <= 1):
            raise UsageError(f'quantize_cfg.calibration.{key}={found[key]!r} is not from 0 to 1')
    for key in ('feed_back', 'fit_norms'):
        if not isinstance(found[key], bool):
            raise UsageError(
                f'quantize_cfg.calibration.{key}={found[key]!r} is neither True nor False')
    for key, least in (('images', 1), ('held_out', 0), ('search_images', 1), ('rounds', 0),
                       ('rows', 4), ('views', 1)):
        _check_integer(found[key], least, f'calibration.{key}')
    return found


def levels_of(given):
    """`levels`, fine to coarse."""
    return _without_whole(check_levels(given, 'quantize_cfg.levels'), 'levels')


def pos_of(given):
    """`pos` as a POSConfig."""
    try:
        found = POSConfig(**(given or {}))
    except TypeError as error:
        raise UsageError(f'quantize_cfg.pos: {error}') from None
    _without_whole(found.stage1_levels, 'pos.stage1_levels')
    _without_whole([found.stage2_start], 'pos.stage2_start')
    for i, step in enumerate(found.steps):
        _without_whole(step.get('levels') or (), f'pos.steps.{i}.levels')
    return found


def reconstruction_of(given, of_heads, pos):
    """`reconstruction` and `head_reconstruction` as they are.

    Args:
        given, of_heads (dict | None): of the config.
        pos (POSConfig): its steps have overrides, which are checked too.

    Returns:
        tuple[dict, dict]: layers of `UnitConfig.build`; the second is of neck and heads.
    """
    found = tuple({} if own is None else own for own in (given, of_heads))
    for key, own in zip(('reconstruction', 'head_reconstruction'), found):
        UnitConfig.check(own, f'quantize_cfg.{key}')
    for i, step in enumerate(pos.steps):
        UnitConfig.check(
            step.get('reconstruction') or {}, f'quantize_cfg.pos.steps.{i}.reconstruction')
    return found


def rois_of(given):
    """`rois` with its defaults."""
    found = _known(_ROIS, given, 'rois')
    for key, value in found.items():
        _check_integer(value, 0, f'rois.{key}')
    return found


def dtype_of(name):
    """`cache_dtype` as torch's."""
    if name is None:
        return None
    if name not in ('float16', 'bfloat16', 'float32'):
        raise UsageError(
            f"quantize_cfg.cache_dtype={name!r} is not known; choose 'float16', "
            "'bfloat16', 'float32' or None")
    return getattr(torch, name)


def cache_memory_of(given):
    """`cache_memory_mb` as it is."""
    if given is not None and (isinstance(given, bool) or not isinstance(given, (int, float))
                              or not given >= 0):
        raise UsageError(f'quantize_cfg.cache_memory_mb={given!r} is neither None nor a number '
                         'of 0 or more')
    return given


def folder_of(given, key):
    """`cache_dir` or `calibration_dir` as it is."""
    if given is not None and not isinstance(given, str):
        raise UsageError(f'quantize_cfg.{key}={given!r} is neither None nor a path')
    return given


def evaluate_of(given):
    """`evaluate` with its defaults."""
    return _known(_EVALUATE, given, 'evaluate')


def total_iters_of(given):
    """`total_iters` as it is."""
    if given is not None and (not isinstance(given, int) or given < 1):
        raise UsageError(
            f'quantize_cfg.total_iters={given!r} is not an integer of 1 or more')
    return given


def images_at_once_of(given):
    """`images_at_once` as it is."""
    if given is not None:
        _check_integer(given, 1, 'images_at_once')
    return given


def on_nonfinite_of(given):
    """`on_nonfinite` as it is."""
    if given not in ON_NONFINITE:
        raise UsageError(f'quantize_cfg.on_nonfinite={given!r} is not known; choose '
                         f'one of {ON_NONFINITE}')
    return given


def _without_whole(levels, key):
    """`levels`, which are of the backbone."""
    if WHOLE in levels:
        raise UsageError(f'quantize_cfg.{key} has {WHOLE!r}, which belongs to '
                         'quantize_cfg.head_levels: it comes after neck and heads')
    return levels


def _check_integer(value, least, key):
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f'quantize_cfg.{key}={value!r} is not an integer of {least} or more')


def _known(defaults, given, key):
    if given is not None and not isinstance(given, dict):
        raise UsageError(f'quantize_cfg.{key}={given!r} is no dict')
    check_keys(given or {}, defaults, f'quantize_cfg.{key}')
    return {**defaults, **(given or {})}
