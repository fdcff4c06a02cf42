"""A reconstruction that goes on in the middle ends in the same bits."""
import copy
import io

import pytest
import torch
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm.models.state import load_model_state, model_state
from pfcr_mm.reconstruction import ChainReconstructor, Stage, UnitConfig, build_schedule
from pfcr_mm.reconstruction.cache import FeatureCache

DEVICE = torch.device('cpu')
LEVELS = ['leaf', 'block', 'pair', 'stage', 'backbone']
FINAL = Stage(2, True, True, tuple(LEVELS))
CONFIG = UnitConfig(iters=4, batch_size=4, weight_lr=3e-3, adaround_lr=0.2, scale_lr=1e-2,
                    bias_lr=2e-3, input_mix=0.5, keep_prob=0.8)


class Killed(BaseException):
    """Stands for the end of the process."""


def reconstructor(model, teacher, inputs, dtype, memory_mb=None):
    return ChainReconstructor(chain_of(model), chain_of(teacher), stream(inputs), stream(inputs),
                              DEVICE, 4, 0, FeatureCache(dtype, memory_mb))


def saved(content):
    """What a checkpoint keeps of it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize('dtype', [None, torch.float16], ids=['float32', 'float16'])
@pytest.mark.parametrize('traversal', ['post_order', 'level_order'])
@pytest.mark.parametrize('rounding', ['latent', 'adaround'])
def test_killed_after_each_unit(rounding, traversal, dtype):
    model, teacher, inputs = toy(rounding, branches=6, images=12)
    untouched = copy.deepcopy(model)
    whole = reconstructor(model, teacher, inputs, dtype)
    schedule = build_schedule(whole.chain, LEVELS, traversal)
    records = whole.run(schedule, lambda level: CONFIG, FINAL)
    expected = learned_state(model)
    assert any(record.accepted for record in records)

    model, state, losses = untouched, None, []
    for first in range(len(schedule)):
        # the first few states in memory, the rest in files
        piece = reconstructor(model, teacher, inputs, dtype, memory_mb=0.01)
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
