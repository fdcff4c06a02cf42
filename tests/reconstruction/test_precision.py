"""Steps of learning in mixed precision."""
import math

import pytest
import torch
from test_optimize import DEVICE, QUICK, run
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm.benchmark.cases import build_case
from pfcr_mm.errors import UsageError
from pfcr_mm.modules import quantizers_of
from pfcr_mm.quantizers import QuantizerSpec, build_quantizer
from pfcr_mm.reconstruction import UnitConfig, harden, units_of
from pfcr_mm.reconstruction.capture import Targets, advance
from pfcr_mm.reconstruction.faults import Faults
from pfcr_mm.reconstruction.learned_parameters import LearnedParameters
from pfcr_mm.reconstruction.losses import ChannelMSELoss
from pfcr_mm.reconstruction.noise import ImageNoise
from pfcr_mm.reconstruction.optimize import Batch, reconstruct, unit_modules

HALF = pytest.mark.parametrize('name', ['bfloat16', 'float16'])


def config(**changes):
    return UnitConfig(**{**QUICK.__dict__, **changes})


def gradients(case, scale=1.0, **changes):
    """Gradients of a step and its loss, and what products of matrices put out."""
    modules = unit_modules(case.chain, case.unit)
    dtypes = set()
    handles = [m.register_forward_hook(lambda _, args, out: dtypes.add(out.dtype))
               for root in modules for m in root.modules() if isinstance(m, torch.nn.Linear)]
    indices = list(range(case.batch))
    state = case.inputs.batch(indices, 'cpu')
    target = tuple(t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
                   for t in case.float_chain.run(state, case.unit.start, case.unit.stop)[0].tensors)
    sizes = [case.inputs.states[i].rows for i in indices]
    batch = Batch(state, target, indices, sizes, sum(sizes), 0, ImageNoise(0))
    with LearnedParameters(modules, config(**changes), 'rounding') as learned:
        loss = learned.backward(
            case.chain, case.unit, batch,
            lambda found, wanted: scale * (found[0] - wanted[0]).square().mean(), 0.0,
            case.batch).settle()
        scaler = learned.precision.scaler
        scaler.unscale_(learned.optimizer)
        found = [p.grad.clone() for p in learned.parameters]
        before = [p.detach().clone() for p in learned.parameters]
        scaler.step(learned.optimizer)
        moved = [not torch.equal(a, b) for a, b in zip(before, learned.parameters)]
        for parameter, value in zip(learned.parameters, before):
            parameter.data.copy_(value)
    for handle in handles:
        handle.remove()
    return found, loss.item(), dtypes, moved


@HALF
@pytest.mark.parametrize('kind', ['swin_block', 'vit_block'])
def test_gradients_are_those_of_float32_nearly(name, kind):
    case = build_case(kind, 'demo', bits=8)
    (want, loss, float_types, _), (got, half_loss, types, _) = (
        gradients(case), gradients(case, autocast=name))
    assert float_types == {torch.float32} and types == {getattr(torch, name)}
    assert half_loss == pytest.approx(loss, rel=0.02) and half_loss != loss
    assert all(g.dtype == torch.float32 for g in got)
    for a, b in zip(got, want):
        if b.numel() > 100:  # weights and biases; those of scales are sums that cancel
            assert (a - b).norm() < 0.2 * b.norm()


def test_small_gradients_survive_float16():
    case = build_case('vit_block', 'demo', bits=8)
    want, loss, *_ = gradients(case, 1e-3)
    got, half_loss, *_ = gradients(case, 1e-3, autocast='float16')
    assert half_loss == pytest.approx(loss, rel=0.02)
    big = [k for k, g in enumerate(want) if g.numel() > 100]
    assert all((got[k] - want[k]).norm() < 0.2 * want[k].norm() for k in big)


def test_a_step_that_overflows_is_left_out():
    case = build_case('vit_block', 'demo', bits=8)
    *_, moved = gradients(case, autocast='float16')
    assert all(moved)
    found, loss, _, moved = gradients(case, 1e9, autocast='float16')
    assert math.isfinite(loss) and not all(torch.isfinite(g).all() for g in found)
    assert not any(moved)


@HALF
@pytest.mark.parametrize('rounding', ['latent', 'adaround'])
def test_learning_helps_as_much(name, rounding):
    """Held-out losses are those of the model as it will run, in float32."""
    after = {}
    for autocast in (None, name):
        model, teacher, inputs = toy(rounding)
        record, *_ = run(model, teacher, inputs, ['block'], config(autocast=autocast))
        after[autocast] = record
    assert after[name].loss_before == after[None].loss_before
    assert after[name].loss_after == pytest.approx(after[None].loss_after, rel=0.1)
    assert after[name].loss_after != after[None].loss_after


@HALF
def test_the_same_again(name):
    states = []
    for _ in range(2):
        model, teacher, inputs = toy()
        run(model, teacher, inputs, config=config(iters=6, autocast=name))
        states.append(learned_state(model))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@HALF
@pytest.mark.parametrize('kind', ['uniform', 'log2', 'adalog'])
def test_quantizers_compute_in_float32(name, kind):
    dtype = getattr(torch, name)
    quantizer = build_quantizer(QuantizerSpec(kind, 8))
    quantizer.set_scale(torch.tensor([0.00371]))
    quantizer.enabled = True
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))
    quantizer.keep_prob = 0.5
    assert quantizer(x).dtype == dtype


@HALF
def test_a_model_in_half_precision_runs(name):
    model, _, inputs = toy()
    harden(model)
    want = model(inputs[0])
    got = model.to(getattr(torch, name))(inputs[0].to(getattr(torch, name)))
    assert got.dtype == getattr(torch, name)
    assert (got.float() - want).norm() < 0.2 * want.norm()


# --- overflow ---------------------------------------------------------------------------

class Steep(ChannelMSELoss):
    """The loss at gradients so steep that float16 has no room for them, before or ever."""

    factor = 1.0

    def __call__(self, outputs, targets):
        loss = super().__call__(outputs, targets)
        return loss + (loss - loss.detach()) * (self.factor - 1)


def steep_unit(factor, **changes):
    """(record or error, lines told) of a unit whose gradients are `factor` times as steep."""
    model, teacher, inputs = toy()
    chain, told = chain_of(model), []
    unit = units_of(chain, 'block')[0]
    own, targets = stream(inputs), Targets(
        *advance(chain_of(teacher), stream(inputs), unit.start, unit.stop, DEVICE))
    loss_of = Steep(targets, -1)
    loss_of.factor = factor
    found = reconstruct(
        chain, unit, own, own, targets, config(**{'iters': 20, 'autocast': 'float16', **changes}),
        'rounding', 4, torch.Generator().manual_seed(0), DEVICE, faults=Faults(told.append),
        loss_of=loss_of)
    return found, told


def test_a_unit_without_overflow_tells_nothing():
    found, told = steep_unit(1.0)
    assert found['accepted'] and found['iters'] == 20 and told == []


@pytest.mark.parametrize('count, tells', [(0, False), (2, False), (3, True)])
def test_a_tenth_of_the_steps_is_not_told(count, tells):
    told = []
    Faults(told.append).left_out(units_of(chain_of(toy()[0]), 'block')[0], count, 20)
    assert bool(told) == tells


def test_many_steps_left_out_are_told():
    found, told = steep_unit(1e6)
    assert found['iters'] == 20
    assert len(told) == 1 and 'of 20 steps were left out' in told[0] and 'bfloat16' in told[0]


def test_gradients_that_never_fit_restore_the_unit():
    found, told = steep_unit(1e30, iters=40)
    assert not found['accepted'] and found['iters'] < 40
    assert len(told) == 1 and 'no loss scale of float16 is small enough' in told[0]


def test_clipping_leaves_overflowing_steps_out():
    found, told = steep_unit(1e6, clip_grad=1.0)
    assert found['iters'] == 20 and math.isfinite(found['loss_after']) and len(told) == 1


def test_steps_without_gradients_pass():
    model, _, _ = toy()
    modules = unit_modules(chain_of(model), units_of(chain_of(model), 'block')[0])
    with LearnedParameters(modules, config(autocast='float16'), 'rounding') as learned:
        before = [p.detach().clone() for p in learned.parameters]
        for _ in range(2):
            learned.update()
        assert all(torch.equal(a, b) for a, b in zip(before, learned.parameters))
        assert not learned.precision.overflows()


@pytest.mark.parametrize('value', ['half', 16, True])
def test_an_unknown_type_is_refused(value):
    with pytest.raises(UsageError, match=r'autocast=.*bfloat16.*float16.*None'):
        UnitConfig(autocast=value)


def test_nothing_is_left_behind():
    model, teacher, inputs = toy()
    chain = chain_of(model)
    modules = unit_modules(chain, units_of(chain, 'block')[0])
    with pytest.raises(ZeroDivisionError), LearnedParameters(
            modules, config(autocast='bfloat16'), 'rounding') as learned:
        batch = Batch(stream(inputs).states[0], (), [0], [1], 1, 0, ImageNoise(0))
        learned.backward(chain, units_of(chain, 'block')[0], batch, lambda *_: 1 / 0, 0.0, 1)
    assert not torch.is_autocast_enabled('cpu')
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(q.keep_prob == 1.0 for _, q in quantizers_of(model))
