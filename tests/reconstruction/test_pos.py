"""The stages of POS, for every reading of it."""
import pytest

from pfcr_mm.errors import UsageError
from pfcr_mm.reconstruction import POSConfig

LEVELS = ['leaf', 'block', 'pair', 'stage', 'backbone']


def stages(**pos):
    return POSConfig(**pos).stages(LEVELS)


def test_off_is_one_stage_with_everything_quantized():
    stage, = stages(mode='off')
    assert stage.number == 1 and stage.quantize_weights and stage.final
    assert list(stage.levels) == LEVELS and stage.shrink == 1


def test_quantizer_trains_float_weights_before_the_reparameterisation():
    first, second = stages(mode='quantizer', stage1_levels=['leaf', 'block'])
    assert (first.number, first.quantize_weights, first.final) == (1, False, False)
    assert list(first.levels) == ['leaf', 'block']
    assert (second.number, second.quantize_weights, second.final) == (2, True, True)
    assert list(second.levels) == LEVELS


def test_operand_quantizes_activations_first_in_the_final_form():
    first, second = stages(mode='operand', stage1_levels=['block'])
    assert (first.number, first.quantize_weights, first.final) == (1, False, True)
    assert list(first.levels) == ['block']
    assert (second.number, second.quantize_weights, second.final) == (2, True, True)


@pytest.mark.parametrize('start, rest', [
    ('leaf', LEVELS), ('block', LEVELS[1:]), ('stage', LEVELS[3:]), ('quad', LEVELS[3:])])
def test_unit_sweeps_again_from_a_coarser_level(start, rest):
    first, second = stages(mode='unit', stage2_start=start, stage2_shrink=0.25)
    assert first.quantize_weights and first.final and list(first.levels) == LEVELS
    assert second.quantize_weights and second.final and list(second.levels) == rest
    assert (first.shrink, second.shrink) == (1, 0.25)


def test_first_stage_options():
    first, second = stages(stage1_parts=['backbone', 'neck'], stage1_shrink=0.5)
    assert list(first.parts) == ['backbone', 'neck'] and first.shrink == 0.5
    assert list(second.parts) == ['*'] and second.shrink == 1


def test_default_is_the_quantizer_reading():
    assert POSConfig().mode == 'quantizer'


@pytest.mark.parametrize('pos, message', [
    (dict(mode='both'), "pos.mode='both' is not known.*'quantizer'"),
    (dict(stage1_levels=['leafs']), "pos.stage1_levels has 'leafs'"),
    (dict(stage2_start='end'), "pos.stage2_start has 'end'"),
    (dict(stage1_shrink=-3), 'pos.stage1_shrink=-3 is not a number above 0'),
    (dict(stage2_shrink=float('nan')), 'pos.stage2_shrink=nan is not a number above 0'),
], ids=['mode', 'levels', 'start', 'shrink', 'nan'])
def test_mistakes_name_the_key(pos, message):
    with pytest.raises(UsageError, match=message):
        POSConfig(**pos)


def test_steps_say_what_other_methods_do():
    """BRECQ, then I&S-ViT."""
    first, second = stages(mode='steps', steps=[
        dict(activations='float'), dict(learn='scales', shrink=0.25, levels=['block'])])
    assert (first.quantize_weights, first.quantize_activations, first.final) == (True, False, True)
    assert (first.learns, list(first.levels)) == ('rounding', LEVELS)
    assert (second.number, second.learns, second.shrink) == (2, 'fixed', 0.25)
    assert list(second.levels) == ['block'] and second.reconstruction == {}
    first, second = stages(mode='steps', steps=[
        dict(weights='float', norms='channel', parts='backbone',
             reconstruction=dict(input_mix=0.0)), {}])
    assert (first.learns, first.final, first.parts) == ('float', False, ('backbone', ))
    assert first.reconstruction == dict(input_mix=0.0)
    assert (second.learns, second.final) == ('rounding', True)


@pytest.mark.parametrize('pos, words', [
    (dict(mode='steps'), "belongs to pos.mode='steps'"),
    (dict(mode='off', steps=[{}]), "belongs to pos.mode='steps'"),
    (dict(mode='steps', steps=[dict(weight='float')]), 'pos.steps.0.weight is not a known key'),
    (dict(mode='steps', steps=[{}, dict(learn='none')]), r"pos.steps.1.learn='none'"),
    (dict(mode='steps', steps=[dict(norms='channel')]), "norms='tensor'"),
    (dict(mode='steps', steps=[{}, dict(norms='channel', weights='float')]),
     "pos.steps.1.norms='channel' comes after"),
    (dict(mode='steps', steps=[dict(parts=None)]), 'pos.steps.0.parts=None is no list'),
    (dict(mode='steps', steps=[dict(shrink='a')]), "pos.steps.0.shrink='a' is not a number"),
    (dict(mode='steps', steps=[dict(levels=['window'])]), "pos.steps.0.levels has 'window'"),
], ids=str)
def test_bad_steps(pos, words):
    with pytest.raises(UsageError, match=words):
        POSConfig(**pos)
