"""Reconstruction of units: what is learned, accepted, undone, and repeated."""
import copy

import pytest
import torch
from marks import needs_compiler
from mmdet.models.backbones.swin import WindowMSA
from torch import nn
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm.errors import UsageError
from pfcr_mm.models import QuantConfig, State, convert
from pfcr_mm.modules import QuantLayer, quantizers_of, set_quantization
from pfcr_mm.reconstruction import (
    ChainReconstructor,
    Stage,
    UnitConfig,
    build_schedule,
    calibrate,
    harden,
    observe,
    pfcr,
    units_of,
)
from pfcr_mm.reconstruction.learned_parameters import LearnedParameters
from pfcr_mm.reconstruction.optimize import unit_modules

DEVICE = torch.device('cpu')
ROUNDINGS = pytest.mark.parametrize('rounding', ['latent', 'adaround', 'nearest'])
FINAL = Stage(2, True, True, ('leaf', 'block'))
FLOAT_WEIGHTS = Stage(1, False, False, ('leaf', 'block'))
QUICK = UnitConfig(iters=40, batch_size=4, weight_lr=3e-3, adaround_lr=3e-2, scale_lr=1e-2,
                   bias_lr=2e-3)


def reconstructor(model, teacher, inputs, held_out=4, seed=0):
    return ChainReconstructor(
        chain_of(model), chain_of(teacher), stream(inputs), stream(inputs), DEVICE, held_out, seed)


def run(model, teacher, inputs, levels=('leaf', 'block'), config=QUICK, stage=FINAL, **kwargs):
    runner = reconstructor(model, teacher, inputs, **kwargs)
    return runner.run(build_schedule(runner.chain, list(levels)), lambda level: config, stage)


def output_error(model, teacher, inputs):
    with torch.no_grad():
        return sum((model(x) - teacher(x)).square().mean().item() for x in inputs) / len(inputs)


# --- learning ------------------------------------------------------------------

@ROUNDINGS
def test_loss_falls(rounding):
    model, teacher, inputs = toy(rounding)
    before = output_error(model, teacher, inputs)
    records = run(model, teacher, inputs, ['leaf', 'block', 'stage', 'backbone'])
    assert len(records) == 8 + 4 + 2 + 1
    leaves = [r.accepted for r in records if r.level == 'leaf']
    assert sum(leaves) >= (7 if rounding == 'latent' else 3)
    assert all(r.loss_after < r.loss_before for r in records if r.accepted)
    assert output_error(model, teacher, inputs) < (0.7 if rounding == 'latent' else 0.92) * before


def test_learning_weights_beats_learning_scales_alone():
    errors = {}
    for rounding in ('latent', 'nearest'):
        model, teacher, inputs = toy(rounding)
        run(model, teacher, inputs, ['leaf', 'block'])
        errors[rounding] = output_error(model, teacher, inputs)
    assert errors['latent'] < errors['nearest']


def test_first_stage_learns_float_weights():
    model, teacher, inputs = toy()
    set_quantization(model, False, True)
    before = learned_state(model)
    records = run(model, teacher, inputs, ['leaf'], stage=FLOAT_WEIGHTS)
    assert any(r.accepted for r in records) and all(r.pos_stage == 1 for r in records)
    changed = {k for k, v in learned_state(model).items() if not torch.equal(v, before[k])}
    assert any(k.endswith('fc1.weight') for k in changed)
    assert not any('weight_quantizer' in k for k in changed)


@ROUNDINGS
def test_hardened_model_computes_what_the_learned_one_computed(rounding):
    model, teacher, inputs = toy(rounding)
    run(model, teacher, inputs, ['leaf'])
    before = [model(x) for x in inputs]
    assert harden(model) == 16
    for x, y in zip(inputs, before):
        torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-4)
    again = learned_state(model)
    harden(model)
    assert all(torch.equal(v, again[k]) for k, v in learned_state(model).items())


@ROUNDINGS
def test_what_a_rounding_learns(rounding):
    model, teacher, inputs = toy(rounding)
    before = learned_state(model)
    records = run(model, teacher, inputs, ['leaf'])
    assert records[0].accepted
    after = learned_state(model)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert ('branches.0.fc1.weight' in changed) == (rounding == 'latent')
    assert ('branches.0.fc1.rounding.v' in after) == (rounding == 'adaround')
    assert {'branches.0.fc1.bias', 'branches.0.fc1.input_quantizer.log_scale'} <= changed
    # AdaRound's up or down holds for one scale only
    assert ('branches.0.fc1.weight_quantizer.log_scale' in changed) == (rounding != 'adaround')
    assert not any('norm' in k for k in changed)


def test_a_rate_of_zero_keeps_its_parameters():
    model, teacher, inputs = toy()
    before = learned_state(model)
    config = UnitConfig(iters=5, scale_lr=0, weight_scale_lr=0, bias_lr=0, norm_lr=1e-3)
    run(model, teacher, inputs, ['leaf'], config)
    after = learned_state(model)
    changed = {k.rpartition('.')[2] if 'norm' not in k else 'norm'
               for k in before if not torch.equal(before[k], after[k])}
    assert changed == {'weight', 'norm'}


def test_a_rate_of_zero_leaves_adaround_alone():
    """What was decided stays hard; a layer without decisions gets none."""
    model, teacher, inputs = toy(rounding='adaround')
    run(model, teacher, inputs, ['leaf'], UnitConfig(iters=3))
    before = learned_state(model)
    config = UnitConfig(iters=3, adaround_lr=0.0, weight_scale_lr=1.0)
    run(model, teacher, inputs, ['block'], config)
    after = learned_state(model)
    kept = [k for k in before if k.endswith(('rounding.v', 'weight_quantizer.log_scale'))]
    assert any(k.endswith('rounding.v') for k in kept)
    assert all(torch.equal(before[k], after[k]) for k in kept)
    fresh, teacher, inputs = toy(rounding='adaround')
    run(fresh, teacher, inputs, ['leaf'], config)
    assert not any(k.endswith('rounding.v') for k in learned_state(fresh))


@pytest.mark.parametrize('options', [dict(input_mix=0.5), dict(keep_prob=0.5),
                                     dict(loss='mse'), dict(clip_grad=0.1)], ids=str)
def test_options_run_and_help(options):
    model, teacher, inputs = toy()
    before = output_error(model, teacher, inputs)
    config = UnitConfig(**{**QUICK.__dict__, **options})
    run(model, teacher, inputs, ['leaf', 'block'], config)
    assert output_error(model, teacher, inputs) < before
    assert all(q.keep_prob == 1 for _, q in quantizers_of(model))


# --- undoing ---------------------------------------------------------------------

@ROUNDINGS
def test_a_rise_is_undone_exactly(rounding):
    model, teacher, inputs = toy(rounding)
    before = learned_state(model)
    wild = UnitConfig(iters=4, weight_lr=9.0, adaround_lr=9.0, scale_lr=3.0, weight_scale_lr=3.0,
                      bias_lr=9.0, norm_lr=9.0)
    records = run(model, teacher, inputs, ['leaf', 'block', 'backbone'], wild)
    assert not any(r.accepted for r in records)
    after = learned_state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_rise_after_success_returns_to_the_success():
    """AdaRound's variables of an accepted unit survive a rejected coarser one."""
    model, teacher, inputs = toy('adaround')
    run(model, teacher, inputs, ['leaf'])
    before = learned_state(model)
    assert any(k.endswith('rounding.v') for k in before)
    wild = UnitConfig(iters=4, adaround_lr=9.0, scale_lr=3.0, weight_scale_lr=3.0, bias_lr=9.0)
    records = run(model, teacher, inputs, ['block'], wild)
    assert not any(r.accepted for r in records)
    after = learned_state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_loss_that_is_no_number_is_undone():
    model, teacher, inputs = toy()
    before = learned_state(model)
    config = UnitConfig(iters=2, weight_lr=1e37, bias_lr=1e37)
    records = run(model, teacher, inputs, ['leaf'], config)
    assert not any(r.accepted for r in records)
    assert all(torch.equal(v, before[k]) for k, v in learned_state(model).items())


# --- leaving no trace ----------------------------------------------------------------

@ROUNDINGS
def test_nothing_stays_open(rounding):
    model, teacher, inputs = toy(rounding)
    teacher_before = learned_state(teacher)
    run(model, teacher, inputs)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(getattr(m.rounding, 'is_open', False) for m in model.modules()
                   if isinstance(m, QuantLayer))
    assert all(torch.equal(v, teacher_before[k]) for k, v in learned_state(teacher).items())


def test_a_unit_changes_its_own_leaves_only():
    model, teacher, inputs = toy()
    runner = reconstructor(model, teacher, inputs)
    unit = units_of(runner.chain, 'block')[1]
    before = learned_state(model)
    runner.run([unit], lambda level: QUICK, FINAL)
    changed = {int(k.split('.')[1]) for k, v in learned_state(model).items()
               if not torch.equal(v, before[k])}
    assert changed == {2, 3}


@pytest.mark.parametrize('bits, share', [(2, 1), (4, 1), (6, 15 / 63), (8, 15 / 255)])
@pytest.mark.parametrize('learns', ['rounding', 'float'])
def test_fine_weights_have_small_rates(bits, share, learns):
    """8-bit weights would move a step an iteration at the rate of 4-bit ones."""
    layers = nn.ModuleDict(dict(fine=nn.Linear(4, 4), coarse=nn.Linear(4, 4)))
    convert(layers, QuantConfig(weight_bits=4, first_last_bits=None, overrides=[
        dict(pattern='fine', weight_bits=bits)]))
    for layer in layers.values():
        layer.weight_quantizer.set_scale(torch.ones(4))
    with LearnedParameters([layers], QUICK, learns) as learned:
        rates = {parameter: group['base_lr'] for group in learned.optimizer.param_groups
                 for parameter in group['params']}
        assert rates[layers.fine.weight] == pytest.approx(share * QUICK.weight_lr)
        assert rates[layers.coarse.weight] == QUICK.weight_lr
        assert rates[layers.fine.bias] == QUICK.bias_lr


@pytest.mark.parametrize('iters, lr, rate', [
    (20000, None, 1e-3), (1000, None, 0.02), (20, None, 0.1), (20, 0.3, 0.3)])
def test_rate_of_adaround(iters, lr, rate):
    """The same way to go in runs of any length; it does not decay like the others."""
    model, _, _ = toy('adaround')
    chain = chain_of(model)
    modules = unit_modules(chain, units_of(chain, 'block')[0])
    config = UnitConfig(iters=iters, adaround_lr=lr)
    with LearnedParameters(modules, config, 'rounding') as learned:
        variables = {layer.rounding.v for layer in learned.open}
        learned.set_progress(0.75)
        for group in learned.optimizer.param_groups:
            own = variables.issuperset(group['params'])
            assert own or not variables & set(group['params'])
            assert group['lr'] == pytest.approx(rate if own else 0.14644660941 * group['base_lr'])


def test_adaround_comes_to_a_decision():
    """Its network behind the last step is the one that is evaluated."""
    model, teacher, inputs = toy('adaround')
    run(model, teacher, inputs, ['block'], UnitConfig(iters=120, batch_size=4))
    found = torch.cat([layer.rounding.rectified().flatten() for layer in model.modules()
                       if isinstance(layer, QuantLayer)])
    assert ((found - 0.5).abs() > 0.4).float().mean() > 0.95


def test_learned_parameters_close_on_an_error():
    model, _, _ = toy('adaround')
    chain = chain_of(model)
    modules = unit_modules(chain, units_of(chain, 'block')[0])
    with pytest.raises(ZeroDivisionError), LearnedParameters(
            modules, UnitConfig(keep_prob=0.5), 'rounding') as learned:
        assert learned.open and all(p.requires_grad for p in learned.parameters)
        raise ZeroDivisionError
    assert not any(p.requires_grad for p in model.parameters())
    assert all(q.keep_prob == 1 for _, q in quantizers_of(model))


@needs_compiler
def test_fused_kernels_learn_the_same(monkeypatch):
    from pfcr_mm.quantizers import fused
    calls, real = [], fused._run
    monkeypatch.setattr(fused, '_run', lambda *args: calls.append(args[0]) or real(*args))
    after = {}
    for compiled in (False, True):
        model, teacher, inputs = toy()
        config = UnitConfig(**{**QUICK.__dict__, 'iters': 8, 'compile': compiled})
        record, *_ = run(model, teacher, inputs, ['block'], config)
        after[compiled] = record.loss_after
        assert bool(calls) == compiled
    assert after[True] == pytest.approx(after[False], rel=1e-3)


# --- the same again -------------------------------------------------------------------

@ROUNDINGS
@pytest.mark.parametrize('options', [{}, dict(input_mix=0.5, keep_prob=0.5)],
                         ids=['plain', 'qdrop'])
def test_same_seed_gives_identical_weights(rounding, options):
    model, teacher, inputs = toy(rounding)
    config = UnitConfig(**{**QUICK.__dict__, 'iters': 12, **options})
    twin = copy.deepcopy(model)
    for each in (model, twin):
        torch.manual_seed(5)
        run(each, teacher, inputs, config=config)
    first, second = learned_state(model), learned_state(twin)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_another_seed_gives_other_weights():
    model, teacher, inputs = toy()
    twin = copy.deepcopy(model)
    run(model, teacher, inputs, ['leaf'], seed=0)
    run(twin, teacher, inputs, ['leaf'], seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(
        learned_state(model).values(), learned_state(twin).values()))


# --- streams on the way ---------------------------------------------------------------

@pytest.fixture()
def checked(monkeypatch):
    """reconstruct() checks its streams first: quantized input from the present prefix, float
    input and target from the float model. Yields the labels seen and the toy."""
    model, teacher, inputs = toy()
    chain, teacher_chain = chain_of(model), chain_of(teacher)
    real, seen = pfcr.reconstruct, []

    def spy(chain_, unit, quantized, floating, targets, *args, **kwargs):
        for x, q, f, t in zip(inputs, quantized.states, floating.states, targets):
            start = State((x, ), x.shape[1])
            for found, each, stop in ((q.tensors, chain, unit.start),
                                      (f.tensors, teacher_chain, unit.start),
                                      (t, teacher_chain, unit.stop)):
                torch.testing.assert_close(found, each.run(start, 0, stop)[0].tensors)
        seen.append(unit.label)
        result = real(chain_, unit, quantized, floating, targets, *args, **kwargs)
        if unit.label == 'B1':
            model.branches[0].fc2.bias.add_(0.5)  # a change for certain
        return result

    monkeypatch.setattr(pfcr, 'reconstruct', spy)
    return seen, model, teacher, inputs


BRIEF = UnitConfig(iters=3, weight_lr=1e-3)


def test_inputs_and_targets_of_each_unit(checked):
    seen, *parts = checked
    run(*parts, ['leaf', 'block', 'pair', 'backbone'], BRIEF)
    assert ' '.join(seen) == 'A1 M1 B1 A2 M2 B2 P1 A3 M3 B3 A4 M4 B4 P2 ALL'


def test_boundaries_behind_a_changed_unit_are_not_reused(checked):
    """All leaves, then the first block, then a leaf that does not touch it."""
    seen, *parts = checked
    runner = reconstructor(*parts)
    leaves, blocks = (units_of(runner.chain, level) for level in ('leaf', 'block'))
    runner.run([*leaves, blocks[0], leaves[4]], lambda level: QUICK, FINAL)
    assert seen[-2:] == ['B1', 'A3']


def test_callbacks_are_called_for_each_unit():
    model, teacher, inputs = toy(branches=4)
    runner, calls = reconstructor(model, teacher, inputs), []
    runner.run(build_schedule(runner.chain, ['leaf']), lambda level: UnitConfig(iters=2), FINAL,
               on_unit_start=lambda unit: calls.append(unit.label),
               on_unit_end=lambda record: calls.append(record.name),
               on_step=lambda step, loss: calls.append(step))
    assert calls[:4] == ['A1', 0, 1, 'backbone.stages.0.blocks.0.attn'] and len(calls) == 16


# --- config ----------------------------------------------------------------------------

def test_per_level_overrides():
    base = dict(iters=7, weight_lr=1e-2, per_level=dict(block=dict(iters=9)))
    assert UnitConfig.build('leaf', base).iters == 7
    block = UnitConfig.build('block', base)
    assert (block.iters, block.weight_lr) == (9, 1e-2)


@pytest.mark.parametrize('base, message', [
    (dict(itres=3), r'^mine\.itres is not a known key; choose of .*iters'),
    (dict(iters=0), r'^mine\.iters=0 is not an integer of 1 or more'),
    (dict(per_level=dict(leaf=dict(lr=3))), r'^mine\.per_level\.leaf\.lr is not a known key'),
    (dict(per_level=dict(leaf=dict(lr=3, per_level={}))),
     r'^mine\.per_level\.leaf\.lr is not a known key'),
    (dict(per_level=dict(leaf=dict(early_stop=dict(every=0)))),
     r'^mine\.per_level\.leaf\.early_stop\.every=0 is not'),
    (dict(per_level=dict(leaves={})), r"^mine\.per_level has 'leaves', which is no level"),
    (dict(per_level=3), r'^mine\.per_level=3 is no dict'),
    (dict(per_level=dict(block=3)), r'^mine\.per_level\.block=3 is no dict'),
    (dict(loss='l1'), r"^mine\.loss='l1' is not a known .*'channel_mse'"),
    (3, '^mine=3 is no dict'),
])
def test_mistakes_name_the_key(base, message):
    with pytest.raises(UsageError, match=message):
        UnitConfig.check(base, 'mine')


# --- gradients through attention ---------------------------------------------------------

@pytest.fixture(scope='module')
def attention():
    """A calibrated window attention, all quantizers on, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(WindowMSA(16, 2, (4, 4))).eval()
    model[0].relative_position_bias_table.data.normal_()
    convert(model, QuantConfig(weight_bits=8, activation_bits=8))
    x = torch.randn(6, 16, 16)
    with observe(model) as seen:
        model(x)
    calibrate(model, seen, 'mse')
    return model, x


def qkv_gradient(model, x):
    weight = model[0].qkv.weight
    weight.grad = None
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)
    (model(x) * weights).sum().backward()
    return weight.grad.clone().chunk(3)


def test_gradient_reaches_upstream_through_q_k_softmax_and_v(attention):
    model, x = attention
    model.requires_grad_(True)
    set_quantization(model, False, False)
    expected = qkv_gradient(model, x)
    set_quantization(model, True, True)
    for name, ours, theirs in zip('qkv', qkv_gradient(model, x), expected):
        cosine = nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0)
        assert cosine > 0.6, name
        assert (ours != 0).float().mean() > 0.9


@pytest.mark.parametrize('operand', ['matmul_qk.left_quantizer', 'matmul_qk.right_quantizer',
                                     'matmul_av.left_quantizer', 'matmul_av.right_quantizer'])
def test_gradient_passes_each_operand_alone(attention, operand):
    model, x = attention
    model.requires_grad_(True)
    set_quantization(model, False, False)
    expected = qkv_gradient(model, x)
    model[0].get_submodule(operand).enabled = True
    for name, ours, theirs in zip('qkv', qkv_gradient(model, x), expected):
        cosine = nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0)
        assert cosine > 0.8, name
    scale = model[0].get_submodule(operand).log_scale
    assert (scale.grad != 0).any()
