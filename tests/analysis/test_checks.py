"""Checks that speak: each on figures made up by hand, and on models broken on purpose."""
import copy
from dataclasses import fields

import pytest
import torch
from demo_runs import REPO

from pfcr_mm.analysis import DiagnosticsHook
from pfcr_mm.analysis.checks import CHECKS, SHOWN, Limits, run_checks
from pfcr_mm.analysis.diagnose import compare_models
from pfcr_mm.analysis.hook import limits_of
from pfcr_mm.engine.hooks.report import finite
from pfcr_mm.errors import UsageError

BLOCK = 'backbone.stages.1.blocks.0'


def unit(accepted, level='leaf', chain='backbone'):
    return dict(name='u', chain=chain, level=level, pos_stage=2, accepted=accepted)


def points(*values):
    return [dict(part='backbone', name=f'stages.{i}', kind='leaf', block=i, letter='A',
                 calibrated=None, quantized=v) for i, v in enumerate(values)]


def activation(**change):
    return dict(dict(name='b.fc1.input_quantizer', role='post-LN', float_low=-2.0, float_high=2.0,
                     low=-2.1, high=2.0, clipped=0.001, sqnr_db=20.0), **change)


def layer(name, db):
    return dict(name=name, sqnr_db=db, weight_bits=4, activation_bits=4)


def head(before, after):
    return dict(name='attn', head=1, float_entropy=before, entropy=after, dead=0.0)


def classes(before, after):
    return dict(float=dict(bbox=dict(disc=before)), quantized=dict(bbox=dict(disc=after)))


@pytest.mark.parametrize('name, good, bad, word', [
    ('early-layers-low-sqnr', dict(propagation=points(20, 18, 9, 9)),
     dict(propagation=points(20, 7, 9, 9)), 'backbone.stages.1'),
    ('attention-entropy-collapsed', dict(attention=[head(0.8, 0.7)]),
     dict(attention=[head(0.8, 0.1)]), 'attn head 1'),
    ('attention-entropy-collapsed', dict(attention=[head(0.99, 1.0)]),
     dict(attention=[head(0.5, 0.99)]), '0.50 to 0.99'),
    ('activation-range-shifted', dict(activations=[activation()]),
     dict(activations=[activation(low=-9.0)]), 'b.fc1'),
    ('activation-range-shifted', dict(activations=[activation(role='q', low=-9.0)]),
     dict(activations=[activation(low=0.0, high=0.0)]), 'b.fc1'),
    ('activations-clipped', dict(activations=[activation(clipped=0.04)]),
     dict(activations=[activation(clipped=0.2)]), '20%'),
    ('layer-far-below-its-kind', dict(layers=[layer(f's.{i}.fc', 15.0 + i) for i in range(4)]),
     dict(layers=[*(layer(f's.{i}.fc', 15.0) for i in range(3)), layer('s.9.fc', 2.0)]), 's.9.fc'),
    ('error-grows', dict(propagation=points(30, 20, 19, 15)),
     dict(propagation=points(30, 20, 19, 5)), 'backbone.stages.3'),
    ('error-grows', dict(propagation=points(20, 17, 14, 11, 9, 7)),
     dict(propagation=points(20, 17, 14, 11, 8, 5)), 'in 5 of 5 steps'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_signals(name, good, bad, word):
    assert [c for c in run_checks(dict(diagnostics=good)) if c['name'] == name] == []
    said = [c for c in run_checks(dict(diagnostics=bad)) if c['name'] == name]
    assert len(said) == 1 and word in said[0]['found']
    assert 'quantize_cfg.' in said[0]['advice'] or 'model.quant.' in said[0]['advice']


def test_a_leaf_is_blamed_for_what_it_adds_itself():
    """12 to 4 dB is an error share of 0.06 to 0.4: a layer of 15 dB adds 0.03, of 5 dB 0.32."""
    found = dict(propagation=points(20, 16, 12, 4))
    for db, blamed in ((15.0, False), (5.0, True)):
        found['layers'] = [layer('backbone.stages.3.fc', db)]
        said, = run_checks(dict(diagnostics=found))
        assert said['name'] == 'error-grows'
        assert ("exclude=['backbone.stages.3.fc']" in said['advice']) is blamed
        assert ('SQNR falls from 12.0 dB to 4.0 dB at backbone.stages.3' in said['found']) is blamed
        assert ('in 3 of 3 steps from block to block, from 20.0 dB to 4.0 dB' in said['found']
                ) is not blamed


def test_growth_ends_behind_the_blocks():
    """A classifier's head counts, and a jump from its stem into the first block is no step."""
    chain = points(40, 10, 9, 8, 7.5, 2.5)
    chain[0]['block'] = chain[-1]['block'] = None
    head = [layer('backbone.stages.5', 15.0)]
    said = [c['found'] for c in run_checks(dict(diagnostics=dict(propagation=chain, layers=head)))]
    assert said == ['SQNR falls from 40.0 dB to 10.0 dB at backbone.stages.1',
                    'SQNR falls in 4 of 4 steps from block to block, from 10.0 dB to 2.5 dB']


def test_early_error_is_told_from_where_it_comes():
    """9 dB behind stages.1 is a share of 0.13, of 0.17 at 7.7 dB behind stages.2."""
    said, = run_checks(dict(diagnostics=dict(propagation=points(14, 9, 7.7, *[7.6] * 9))))
    assert said['name'] == 'early-layers-low-sqnr' and 'backbone.stages.2 leaves' in said['found']
    assert "pattern='backbone.stages.1*'" in said['advice']


def test_what_has_8_bits_is_not_given_8():
    weak = [*(layer(f's.{i}.fc', 30.0) for i in range(3)), layer('s.9.fc', 2.0)]
    for bits, advised in ((8, False), (4, True)):
        weak[-1].update(weight_bits=bits, activation_bits=bits)
        said, = run_checks(dict(diagnostics=dict(layers=weak)))
        assert ("overrides=[dict(pattern='s.9.fc', weight_bits=8, activation_bits=8)]"
                in said['advice']) is advised
        assert "model.quant.exclude=['s.9.fc']" in said['advice']


@pytest.mark.parametrize('name, good, bad, word', [
    ('units-all-restored', dict(units=[unit(True), unit(False), unit(False, 'stage')]),
     dict(units=[unit(False), unit(False), unit(True, 'stage')]), "2 of level 'leaf' in backbone"),
    ('units-all-restored', dict(units=[]), dict(units=[unit(False, chain='neck')]),
     'all 1 of neck'),
    ('class-lost-most-of-its-ap', dict(classes=classes(0.5, 0.4)),
     dict(classes=classes(0.5, 0.2)), "class 'disc' lost 60% of its box AP: 50.0 to 20.0"),
    ('class-lost-most-of-its-ap', dict(classes=classes(0.01, 0.0)),
     dict(classes=classes(0.06, 0.0)), 'disc'),
    ('class-lost-most-of-its-ap', dict(classes=classes(None, 0.2)),
     dict(classes=classes(0.9, 0.0)), 'disc'),
    ('few-calibration-images', dict(calibration=dict(images=32)),
     dict(calibration=dict(images=31)), 'only 31 images'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_records(name, good, bad, word):
    assert run_checks(dict(good, diagnostics={})) == []
    said = run_checks(dict(bad, diagnostics={}))
    assert [c['name'] for c in said] == [name] and word in said[0]['found']
    assert 'quantize_cfg' in said[0]['advice']


def test_without_any_record_nothing_is_said():
    assert run_checks(dict(diagnostics=dict(images=[]))) == []


def test_many_places_are_counted():
    many = [activation(clipped=0.2)] * (SHOWN + 4)
    said = run_checks(dict(diagnostics=dict(activations=many)))
    assert len(said) == SHOWN and said[-1]['found'].endswith('(and 4 more such places)')


def test_every_check_says_what_it_is_for():
    assert all(function.__doc__ for function in CHECKS.values()) and len(CHECKS) >= 8


# --- limits -------------------------------------------------------------------

@pytest.mark.parametrize('limit, value, report', [
    ('early_db', 6.5, dict(diagnostics=dict(propagation=points(20, 7, 9, 9)))),
    ('jump_db', 15, dict(diagnostics=dict(propagation=points(30, 20, 5, 9)))),
    ('drop_db', 4, dict(diagnostics=dict(propagation=points(30, 20, 5, 9)))),
    ('end_db', 4.5, dict(diagnostics=dict(propagation=points(20, 17, 14, 11, 8, 5)))),
    ('layer_db', 1, dict(diagnostics=dict(layers=[
        *(layer(f's.{i}.fc', 15.0) for i in range(3)), layer('s.9.fc', 2.0)]))),
    ('layer_below', 14, dict(diagnostics=dict(layers=[
        *(layer(f's.{i}.fc', 15.0) for i in range(3)), layer('s.9.fc', 2.0)]))),
    ('entropy_lost', 0.9, dict(diagnostics=dict(attention=[head(0.8, 0.1)]))),
    ('entropy_shift', 0.75, dict(diagnostics=dict(attention=[head(0.8, 0.1)]))),
    ('range_factor', 3, dict(diagnostics=dict(activations=[activation(low=-9.0)]))),
    ('clipped', 0.25, dict(diagnostics=dict(activations=[activation(clipped=0.2)]))),
    ('class_lost', 0.7, dict(diagnostics={}, classes=classes(0.5, 0.2))),
    ('class_least', 0.6, dict(diagnostics={}, classes=classes(0.5, 0.2))),
    ('few_images', 8, dict(diagnostics={}, calibration=dict(images=8))),
], ids=lambda value: value if isinstance(value, str) else '')
def test_every_limit_can_be_moved(limit, value, report):
    before = run_checks(report)
    after = run_checks(report, Limits.build({limit: value}))
    assert len(after) == len(before) - 1


def test_all_limits_are_documented_with_their_defaults():
    page = (REPO / 'docs' / 'report.md').read_text()
    for field in fields(Limits):
        assert f'| `{field.name}` | {field.default:g} |' in page, field.name
        assert f'        {field.name} (' in Limits.__doc__


def test_a_config_gives_limits():
    hook = dict(type='pfcr_mm.DiagnosticsHook', checks=dict(few_images=8))
    assert limits_of(dict(quantize_hooks=[dict(type='x'), hook])) == Limits(few_images=8)
    assert DiagnosticsHook(checks=hook['checks']).limits == Limits(few_images=8)
    assert limits_of({}) == DiagnosticsHook().limits == Limits()


@pytest.mark.parametrize('checks, words', [
    (dict(few_image=8), 'checks.few_image is not a known key; choose of .*few_images'),
    (dict(clipped='5%'), "checks.clipped='5%' is not a number"),
    (dict(clipped=True), 'is not a number'), (dict(clipped=float('nan')), 'is not a number'),
    ([1], 'checks=.1. is no dict')], ids=str)
def test_bad_limits(checks, words):
    for build in (lambda: DiagnosticsHook(checks=checks), lambda: limits_of(
            dict(quantize_hooks=[dict(type='pfcr_mm.DiagnosticsHook', checks=checks)]))):
        with pytest.raises(UsageError, match=f'^DiagnosticsHook of quantize_hooks: .*{words}'):
            build()


# --- models broken on purpose -------------------------------------------------

def said_of(model, twin, images):
    """(name, found) of all checks."""
    found, _ = compare_models(images, model, twin)
    return {(c['name'], c['found']) for c in run_checks(finite(dict(diagnostics=found)))}


def names(said, place):
    return {name for name, found in said if place in found}


@pytest.fixture()
def before(quantized, twin, images):
    """What is said of the whole model."""
    return said_of(quantized, twin, images)


def test_one_heads_scale_times_100(quantized, twin, images, before):
    broken = copy.deepcopy(quantized)
    matmul = broken.get_submodule(f'{BLOCK}.attn.w_msa.matmul_qk')
    scale = matmul.left_quantizer.scale.clone()
    scale[1] *= 100
    matmul.left_quantizer.set_scale(scale, matmul.left_quantizer.zero_point.clone())
    said = said_of(broken, twin, images) - before
    assert 'layer-far-below-its-kind' in names(said, f'{BLOCK}.attn.w_msa.matmul_qk')


def test_one_norm_zeroed(quantized, twin, images, before):
    broken = copy.deepcopy(quantized)
    norm = broken.get_submodule(f'{BLOCK}.norm2')
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.zero_()
    said = said_of(broken, twin, images) - before
    assert 'activation-range-shifted' in names(said, f'{BLOCK}.ffn.layers.0.0')


def test_one_layer_at_2_bits(build_quantized, images):
    from tiny_models import calibrated

    from pfcr_mm.modules import set_quantization
    name = f'{BLOCK}.ffn.layers.1'
    said = {}
    for bits in (6, 2):
        override = dict(pattern=name, weight_bits=bits, activation_bits=bits)
        model = calibrated(build_quantized(weight_bits=6, activation_bits=6,
                                           overrides=[override]), images)
        twin = copy.deepcopy(model)
        set_quantization(twin, False, False)
        said[bits] = names(said_of(model, twin, images), name)
    assert said[6] == set() and said[2] == {'layer-far-below-its-kind'}


def test_a_head_that_looks_at_one_key(quantized, twin, images, before):
    """Its softmax scale times 100: every weight is a small share of it and becomes zero."""
    broken = copy.deepcopy(quantized)
    quantizer = broken.get_submodule(f'{BLOCK}.attn.w_msa.matmul_av.left_quantizer')
    scale = quantizer.scale.clone()
    scale[0] *= 1e6
    quantizer.set_scale(scale)
    said = said_of(broken, twin, images) - before
    assert 'attention-entropy-collapsed' in names(said, f'{BLOCK}.attn.w_msa head 0')
