"""What a `quantize_cfg` may say, piece by piece."""
import pytest
import torch

from pfcr_mm.engine import settings
from pfcr_mm.errors import UsageError
from pfcr_mm.reconstruction import UnitConfig


def test_what_is_not_said_has_a_default():
    found = settings.calibration_of(dict(images=8))
    assert found['images'] == 8 and found['search_images'] == 32
    assert settings.calibration_of(None)['images'] == 256  # the other call has left no trace
    assert settings.rois_of(None) == dict(proposals=64, detections=16)
    assert settings.evaluate_of(dict(float=False)) == dict(float=False, calibrated=True, val=False)
    assert settings.dtype_of('float16') is torch.float16 and settings.dtype_of(None) is None


def test_heads_inherit_what_they_do_not_override():
    given = dict(iters=9, loss='mse', per_level=dict(leaf=dict(iters=5), chain=dict(iters=7)))
    base, heads = settings.reconstruction_of(
        given, dict(iters=3, per_level=dict(chain=dict(iters=2))), settings.pos_of(None))
    assert base == given
    found = {level: UnitConfig.build(level, base, heads) for level in ('leaf', 'block', 'chain')}
    # what is said of heads goes over what is said of a level before, as a step's does
    assert {level: config.iters for level, config in found.items()} == dict(
        leaf=3, block=3, chain=2)
    assert {config.loss for config in found.values()} == {'mse'}


def test_the_whole_detector_keeps_what_is_not_overridden():
    layers = [
        *settings.reconstruction_of(
            dict(iters=9, weight_lr=1.0), dict(per_level=dict(detector=dict(scale_lr=0.5))),
            settings.pos_of(None)), dict(loss='mse', bias_lr=0.0)]
    config = UnitConfig.build('detector', *layers)
    assert (config.iters, config.weight_lr, config.scale_lr) == (9, 0.0, 0.5)
    assert config.loss == 'detections' and config.norm_lr > 0 and config.bias_lr > 0
    chain = UnitConfig.build('chain', *layers)
    assert (chain.weight_lr, chain.loss, chain.bias_lr) == (1.0, 'mse', 0.0)


@pytest.mark.parametrize('check, value, words', [
    (settings.levels_of, ['leaf', 'detector'], 'belongs to quantize_cfg.head_levels'),
    (settings.pos_of, dict(stage1_levels=['block', 'detector']), r'pos\.stage1_levels has'),
    (settings.pos_of, dict(mode='unit', stage2_start='detector'), r'pos\.stage2_start has'),
    (settings.pos_of, dict(mode='steps', steps=[dict(), dict(levels=['detector'])]),
     r'pos\.steps\.1\.levels has'),
    (settings.calibration_of, 5, 'calibration=5 is no dict'),
    (settings.calibration_of, dict(image=1), 'calibration.image is not a known key'),
    (settings.calibration_of, dict(method='best'), "method='best' is not known"),
    (settings.calibration_of, dict(rows=3), 'rows=3 is not an integer of 4 or more'),
    (settings.calibration_of, dict(images=True), 'images=True is not an integer of 1'),
    (settings.calibration_of, dict(images=0), 'images=0 is not an integer of 1'),
    (settings.pos_of, dict(modes='off'), 'quantize_cfg.pos: '),
    (settings.rois_of, dict(proposals=-1), 'rois.proposals=-1 is not an integer of 0'),
    (settings.dtype_of, 'float17', "cache_dtype='float17' is not known"),
    (settings.dtype_of, 'int8', "cache_dtype='int8' is not known; choose 'float16'"),
    (settings.dtype_of, '', "cache_dtype='' is not known"),
    (settings.cache_memory_of, -1, 'cache_memory_mb=-1 is neither None nor a number of 0'),
    (settings.cache_memory_of, '4G', "cache_memory_mb='4G' is neither"),
    (lambda given: settings.folder_of(given, 'cache_dir'), 5,
     'cache_dir=5 is neither None nor a path'),
    (lambda given: settings.reconstruction_of(None, given, settings.pos_of(None)), 0,
     'quantize_cfg.head_reconstruction=0 is no dict'),
    (settings.evaluate_of, dict(all=True), 'evaluate.all is not a known key'),
    (settings.total_iters_of, 0, 'total_iters=0 is not an integer of 1 or more'),
    (settings.images_at_once_of, 0, 'images_at_once=0 is not an integer of 1 or more'),
    (settings.on_nonfinite_of, 'hope', "on_nonfinite='hope' is not known"),
], ids=lambda value: getattr(value, '__name__', str(value)))
def test_a_mistake_is_named(check, value, words):
    with pytest.raises(UsageError, match=words):
        check(value)


def test_a_mistake_in_a_step_of_pos_is_named():
    pos = settings.pos_of(dict(mode='steps', steps=[dict(reconstruction=dict(iter=1))]))
    with pytest.raises(UsageError, match=r'pos\.steps\.0\.reconstruction\.iter is not a known key'):
        settings.reconstruction_of(None, None, pos)
