"""A reconstruction that goes on in the middle ends in the same bits."""
import copy
import io

import pytest
import torch
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm.errors import UsageError
from pfcr_mm.models import State
from pfcr_mm.models.state import load_model_state, model_state
from pfcr_mm.modules import set_quantization
from pfcr_mm.reconstruction import (
    ChainReconstructor,
    Stage,
    UnitConfig,
    build_schedule,
    memory,
)
from pfcr_mm.reconstruction.cache import FeatureCache

DEVICE = torch.device('cpu')
LEVELS = ['leaf', 'block', 'pair', 'stage', 'backbone']
FINAL = Stage(2, True, True, tuple(LEVELS))
CONFIG = UnitConfig(iters=4, batch_size=4, weight_lr=3e-3, adaround_lr=0.2, scale_lr=1e-2,
                    bias_lr=2e-3, input_mix=0.5, keep_prob=0.8)


class Killed(BaseException):
    """Stands for the end of the process."""


def reconstructor(model, teacher, inputs, dtype, memory_mb=None, sides=()):
    return ChainReconstructor(
        chain_of(model, sides), chain_of(teacher, sides), stream(inputs), stream(inputs),
        DEVICE, 4, 0, FeatureCache(dtype, memory_mb))


def saved(content):
    """What a checkpoint keeps of it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize('dtype', [None, torch.float16], ids=['float32', 'float16'])
@pytest.mark.parametrize('traversal', ['post_order', 'level_order'])
@pytest.mark.parametrize('rounding, sides', [('latent', ()), ('adaround', ()), ('latent', (3, ))],
                         ids=['latent', 'adaround', 'sides'])
def test_killed_after_each_unit(rounding, sides, traversal, dtype):
    model, teacher, inputs = toy(rounding, branches=6, images=12)
    untouched = copy.deepcopy(model)
    whole = reconstructor(model, teacher, inputs, dtype, sides=sides)
    schedule = build_schedule(whole.chain, LEVELS, traversal)
    records = whole.run(schedule, lambda level: CONFIG, FINAL)
    expected = learned_state(model)
    assert any(record.accepted for record in records)

    model, state, losses = untouched, None, []
    for first in range(len(schedule)):
        # the first few states in memory, the rest in files
        piece = reconstructor(model, teacher, inputs, dtype, memory_mb=0.01, sides=sides)
        if state is not None:
            load_model_state(model, state['model'])
            piece.follow(state['paths'])

        def end(record, piece=piece, model=model):
            losses.append((record.loss_before, record.loss_after))
            raise Killed(saved(dict(model=model_state(model), paths=piece.paths())))

        with pytest.raises(Killed) as killed:
            piece.run(schedule, lambda level: CONFIG, FINAL, on_unit_end=end, first=first)
        state = killed.value.args[0]
        model, *_ = toy(rounding, branches=6, images=12)

    load_model_state(model, state['model'])
    assert losses == [(r.loss_before, r.loss_after) for r in records]
    found = learned_state(model)
    assert found.keys() == expected.keys()
    assert [k for k in expected if not torch.equal(found[k], expected[k])] == []


@pytest.mark.parametrize('levels, loss', [
    (LEVELS, 'mse'), (LEVELS, 'mse_final'), (LEVELS, 'layers'), (['block', 'stage'], 'mse'),
    (['layer', 'block'], 'mse')], ids=['all', 'final', 'layers', 'coarse', 'layer'])
@pytest.mark.parametrize('traversal', ['post_order', 'level_order'])
def test_targets_are_what_the_float_chain_gives(traversal, levels, loss):
    """With all quantizers off nothing is lost anywhere, wherever streams come from."""
    model, _, inputs = toy(images=8)
    set_quantization(model, False, False)
    chains = reconstructor(model, copy.deepcopy(model), inputs, None, sides=(1, 3, 7))
    config = UnitConfig(iters=1, batch_size=2, loss=loss, weight_lr=0.0, bias_lr=0.0)
    records = chains.run(build_schedule(chains.chain, levels, traversal), lambda _: config, FINAL)
    assert len(records) >= 6 and max(record.loss_before for record in records) < 1e-9


def test_what_is_known_is_not_computed_again(monkeypatch):
    """The float chain is run once, the quantized one where a next unit starts."""
    from pfcr_mm.reconstruction import boundaries, pfcr
    model, teacher, inputs = toy(branches=8, images=8)
    runs = {'float': [], 'quantized': []}

    def counted(chain, stream, start, stop, *args, advance=pfcr.advance, **kwargs):
        runs['float' if chain is chains.teacher_chain else 'quantized'].append((start, stop))
        return advance(chain, stream, start, stop, *args, **kwargs)

    for module in (boundaries, pfcr):
        monkeypatch.setattr(module, 'advance', counted)
    chains = reconstructor(model, teacher, inputs, None)
    chains.run(build_schedule(chains.chain, ['leaf', 'block', 'stage']),
               lambda level: UnitConfig(iters=1, batch_size=2), FINAL)
    # A1 M1 B1 A2 M2 B2 S1 ...: what comes behind the last leaf is not kept
    assert runs['float'] == [*[(i, i + 1) for i in range(8)], (6, 8), (4, 8)]
    assert runs['quantized'] == [(0, 1), (0, 2), (2, 3), (0, 4), (4, 5), (4, 6), (6, 7)]


def test_a_leaf_says_that_it_has_sides():
    model, _, inputs = toy(branches=2, images=1)
    chain = chain_of(model, sides=(1, ))
    chain.leaves[1].sides = False
    with pytest.raises(UsageError, match=r"'stages.0.blocks.0.ffn', .* sides=True"):
        memory.boundary_sizes(chain, State((inputs[0], )))


def test_a_unit_that_is_cut_off_is_undone():
    model, teacher, inputs = toy('adaround', branches=4, images=8)
    before = learned_state(model)

    def on_step(step, loss):
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        reconstructor(model, teacher, inputs, None).run(
            build_schedule(chain_of(model), ['leaf']), lambda level: CONFIG, FINAL,
            on_step=on_step)
    after = learned_state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not any(p.requires_grad for p in model.parameters())


def test_follow_holds_no_more_than_it_keeps(monkeypatch):
    """A path of many steps is walked with one stream at a time."""
    from pfcr_mm.reconstruction import boundaries
    alive, most = set(), []

    class Counted:
        def __init__(self):
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    monkeypatch.setattr(boundaries, 'advance', lambda *args, **kwargs: (Counted(), None))
    streams = boundaries.Boundaries(None, Counted(), DEVICE)
    streams.follow({0: (), 9: tuple(range(1, 10)), 4: (2, 4)})
    assert streams.paths == {0: (), 9: tuple(range(1, 10)), 4: (2, 4)}
    assert max(most) <= 4
