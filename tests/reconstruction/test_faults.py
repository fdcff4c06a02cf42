"""Faults in a unit: no memory, NaN and Inf."""
import math

import pytest
import torch
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm import parallel
from pfcr_mm.errors import FaultError
from pfcr_mm.models.chain import Chain
from pfcr_mm.reconstruction import ChainReconstructor, Faults, Stage, UnitConfig, build_schedule
from pfcr_mm.reconstruction.faults import check_seen, find_nonfinite, is_out_of_memory, split_batch

DEVICE = torch.device('cpu')
FINAL = Stage(2, True, True, ('leaf', 'block'))
CONFIG = UnitConfig(iters=6, batch_size=8, weight_lr=3e-3, adaround_lr=3e-2, scale_lr=1e-2,
                    norm_lr=1e-4)
HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    'you tried to allocate 4096000000 bytes. Error code 12 (Cannot allocate memory)')


def run(model, teacher, inputs, faults=None, levels=('leaf', 'block')):
    piece = ChainReconstructor(chain_of(model), chain_of(teacher), stream(inputs), stream(inputs),
                               DEVICE, 4, 0, None, faults)
    return piece.run(build_schedule(piece.chain, list(levels)), lambda level: CONFIG, FINAL)


@pytest.fixture()
def little_memory(monkeypatch):
    """little_memory(rows): a unit of the quantized model takes that many images at a time."""
    real = Chain.run

    def limit(entries, error):
        def run_chain(self, state, start=0, stop=None):
            if torch.is_grad_enabled() and state.tensors[0].shape[0] > entries:
                raise error
            return real(self, state, start, stop)

        monkeypatch.setattr(Chain, 'run', run_chain)

    return limit


@pytest.mark.parametrize('rounding', ['latent', 'adaround'])
@pytest.mark.parametrize('error', [
    HOST, MemoryError(), torch.OutOfMemoryError('CUDA out of memory')],
    ids=['host', 'python', 'cuda'])
def test_out_of_memory_halves_the_batch(error, rounding, little_memory):
    parts = toy(rounding, branches=4, images=20)
    expected = run(*parts)
    told, (model, teacher, inputs) = [], toy(rounding, branches=4, images=20)
    little_memory(3, error)
    found = run(model, teacher, inputs, Faults(tell=told.append))
    assert len(told) == 2 * len(found)  # the loop says it once; 8 -> 4 -> 2
    assert 'out of memory in backbone.stages.0.blocks.0.attn' in told[0] and '4 images' in told[0]
    for a, b in zip(expected, found):
        assert a.loss_before == pytest.approx(b.loss_before, rel=2e-3)
        assert a.loss_after == pytest.approx(b.loss_after, rel=2e-2)
    for key, value in learned_state(parts[0]).items():
        assert torch.allclose(learned_state(model)[key], value, atol=0.02), key


def test_one_step_in_parts_has_the_same_gradient():
    """Entries of several rows, and a regulariser that counts once."""
    from pfcr_mm.models.chain import State
    from pfcr_mm.reconstruction.learned_parameters import LearnedParameters
    from pfcr_mm.reconstruction.losses import MSELoss
    from pfcr_mm.reconstruction.noise import ImageNoise
    from pfcr_mm.reconstruction.optimize import Batch, unit_modules
    from pfcr_mm.reconstruction.units import units_of
    model, teacher, _ = toy('adaround', branches=2)
    chain = chain_of(model)
    unit = units_of(chain, 'block')[0]
    sizes = [3, 1, 2, 5]
    x = torch.randn(sum(sizes), 24, 12)
    target = (teacher(x), )
    loss_of = MSELoss([target], -1)
    gradients = []
    with LearnedParameters(unit_modules(chain, unit), CONFIG, 'rounding') as learned:
        for limit in (4, 3, 1):
            batch = Batch(State((x, )), target, [0, 1, 2, 3], sizes, sum(sizes), 0,
                          ImageNoise(0))
            loss = learned.backward(chain, unit, batch, loss_of, 0.7, limit).settle()
            gradients.append((loss, [p.grad.clone() for p in learned.parameters]))
    for loss, grads in gradients[1:]:
        assert torch.allclose(loss, gradients[0][0], rtol=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6)
                   for a, b in zip(grads, gradients[0][1]))


def test_parts_are_summed_in_any_order():
    """Small ones are not lost beside large ones; what no part asks for has no gradient."""
    first, second = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
    for factors in ([1.0, 2.0**-30, -1.0], [2.0**-30, 1.0, -1.0], [1.0, -1.0, 2.0**-30]):
        found = parallel.GradientSum([first, second])
        for factor in factors:
            found.backward(factor * first)
        assert found.settle() == 2.0**-30
        assert first.grad == 2.0**-30 and second.grad is None


def test_split_batch_keeps_rows_together():
    from pfcr_mm.models.chain import State
    x = torch.arange(6.)[:, None]
    parts = list(split_batch(State((x, )), (x + 1, ), [1, 0, 2, 3], 2))
    assert [p[0].tensors[0].flatten().tolist() for p in parts] == [[0], [1, 2, 3, 4, 5]]
    assert [p[1][0].flatten().tolist() for p in parts] == [[1], [2, 3, 4, 5, 6]]
    assert [p[2] for p in parts] == [1, 5]
    assert [list(range(4))[p[3]] for p in parts] == [[0, 1], [2, 3]]


def test_out_of_memory_with_one_image_says_what_to_set(little_memory):
    model, teacher, inputs = toy(branches=2, images=12)
    before = learned_state(model)
    little_memory(0, HOST)
    with pytest.raises(FaultError, match='quantize_cfg.levels') as caught:
        run(model, teacher, inputs)
    assert 'backbone.stages.0.blocks.0.attn' in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in learned_state(model).items())


def test_other_errors_pass():
    assert not is_out_of_memory(RuntimeError('shapes differ'))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


# --- NaN and Inf ------------------------------------------------------------

@pytest.fixture()
def spoilt(monkeypatch):
    """spoilt(model, harm): at the third step of the second unit, `harm(model)` is done."""
    from pfcr_mm.reconstruction.learned_parameters import LearnedParameters
    real, seen = LearnedParameters.update, []

    def plan(model, harm):
        def update(self):
            real(self)
            seen.append(self)
            if len(seen) == CONFIG.iters + 3:
                with torch.no_grad():
                    harm(model)

        monkeypatch.setattr(LearnedParameters, 'update', update)

    return plan


def names(model):
    return {module: name for name, module in model.named_modules()}.get


@pytest.mark.parametrize('harm, words', [
    (lambda m: m.branches[1].fc1.weight.fill_(math.nan), ['branches.1.fc1', 'weight']),
    (lambda m: m.branches[1].fc2.input_quantizer.log_scale.fill_(100.),
     ['branches.1.fc2.input_quantizer', 'scale']),
    # the quantizer behind clips it, but its scale's gradient is not finite
    (lambda m: m.branches[1].norm.weight.fill_(3e38),
     ['branches.1.fc1.input_quantizer', 'log_scale']),
], ids=['weight', 'scale', 'activation'])
def test_a_unit_that_diverges_is_named_and_restored(harm, words, spoilt):
    model, teacher, inputs = toy(branches=4, images=12)
    told = []
    spoilt(model, harm)
    records = run(model, teacher, inputs, Faults(told.append, 'restore', names(model)), ['leaf'])
    line, = told
    for word in ['backbone.stages.0.blocks.0.ffn', 'the loss of step', *words]:
        assert word in line
    assert not records[1].accepted and not math.isfinite(records[1].loss_after)
    assert len(records) == 4 and any(r.accepted for r in records[2:])
    assert all(torch.isfinite(v).all() for v in learned_state(model).values())


def test_the_first_output_that_is_not_finite_is_named():
    model, _, inputs = toy(branches=4, images=12)
    with torch.no_grad():
        model.branches[1].norm.weight.fill_(3e38)
    chain, state = chain_of(model), stream(inputs).states[0]
    unit = build_schedule(chain, ['leaf'])[1]
    found = find_nonfinite(chain, unit, state, state.tensors, names(model))
    assert found == 'the output of branches.1.norm has NaN or Inf'


def test_stop_leaves_the_unit_as_it_was(spoilt):
    model, teacher, inputs = toy(branches=4, images=12)
    spoilt(model, lambda m: m.branches[1].fc1.weight.fill_(math.inf))
    with pytest.raises(FaultError, match="on_nonfinite='restore'"):
        run(model, teacher, inputs, Faults(print, 'stop', names(model)), ['leaf'])
    assert all(torch.isfinite(v).all() for v in learned_state(model).values())


def test_float_targets_that_are_not_finite():
    model, teacher, inputs = toy(branches=2, images=12)
    teacher.branches[0].fc2.bias.fill_(math.inf)
    told = []
    records = run(model, teacher, inputs, Faults(told.append), ['leaf'])
    assert 'float model itself' in told[0] and not records[0].accepted


def test_calibration_names_the_layer():
    from pfcr_mm.reconstruction import observe
    model, _, inputs = toy(branches=2, images=4)
    model.branches[0].fc2.bias.fill_(math.nan)
    with observe(model) as seen:
        model(inputs[0])
    with pytest.raises(FaultError, match='branches.1.fc1'):
        check_seen(seen)
