"""Units that have learned what they can stop; all others learn as they would."""
import pytest
import torch
from ranks import Ranks
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm import parallel
from pfcr_mm.errors import UsageError
from pfcr_mm.models import State
from pfcr_mm.reconstruction import ChainReconstructor, Stage, UnitConfig, build_schedule
from pfcr_mm.reconstruction.capture import Stream
from pfcr_mm.reconstruction.early_stop import EarlyStop, Plateau

RATES = dict(iters=24, batch_size=6, weight_lr=3e-3, scale_lr=1e-2, bias_lr=2e-3, adaround_lr=0.1)


def run(config, rounding='latent', numbers=None):
    """(records of the leaves, what was learned)."""
    model, teacher, inputs = toy(rounding, branches=2)
    images = stream(inputs) if numbers is None else Stream(
        [State((inputs[i], ), inputs[i].shape[1]) for i in numbers], numbers)
    piece = ChainReconstructor(chain_of(model), chain_of(teacher), images, images,
                               torch.device('cpu'), 6, 0)
    records = piece.run(build_schedule(piece.chain, ['leaf']), lambda unit: config,
                        Stage(1, True, True, ()))
    return records, learned_state(model)


def test_a_plateau_by_hand():
    plateau = Plateau(EarlyStop(every=2, patience=2, min_delta=0.1))
    losses = iter([10.0, 9.5, 8.9, 8.5, 8.2])  # 9.5 is no gain, 8.9 is, 8.5 and 8.2 are none
    found = [plateau.reached(step, lambda: next(losses)) for step in range(1, 11)]
    assert found == [False] * 9 + [True]
    assert not any(Plateau(None).reached(step, None) for step in range(1, 5))


def test_a_unit_that_learns_nothing_more_stops():
    """Rates near zero: the second look already tells nothing new."""
    rates = {name: 1e-9 for name in RATES if name.endswith('_lr')}
    still = UnitConfig(**{**RATES, **rates, 'weight_scale_lr': 0.0},
                       early_stop=dict(every=4, patience=2, min_delta=0.001))
    assert [record.iters for record in run(still)[0]] == [12, 12]


def test_a_unit_that_learns_goes_on():
    config = UnitConfig(**RATES, early_stop=dict(every=6, patience=2, min_delta=0.0))
    records, _ = run(config)
    assert [record.iters for record in records] == [24, 24]
    assert all(record.accepted for record in records)


@pytest.mark.parametrize('rounding', ['latent', 'adaround'])
def test_to_look_changes_nothing(rounding):
    """Roundings stay soft, QDrop draws what it would draw."""
    options = dict(RATES, iters=9, keep_prob=0.5, input_mix=0.5)
    plain = run(UnitConfig(**options), rounding)
    looked = run(UnitConfig(**options, early_stop=dict(every=2, patience=99)), rounding)
    assert [r.loss_after for r in plain[0]] == [r.loss_after for r in looked[0]]
    for key, value in plain[1].items():
        assert torch.equal(value, looked[1][key]), key


def test_adaround_is_looked_at_as_it_would_be_left():
    """A look after the last step is what the unit is accepted by."""
    seen = []
    reached = Plateau.reached

    def spy(self, step, look):
        seen.append((step, look()))
        return reached(self, step, look)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plateau, 'reached', spy)
        records, _ = run(UnitConfig(**dict(RATES, iters=4, keep_prob=0.5)), 'adaround')
    assert [loss for step, loss in seen if step == 4] == [r.loss_after for r in records]


def test_processes_stop_together(tmp_path):
    config = UnitConfig(**RATES, early_stop=dict(every=3, patience=1, min_delta=0.2))
    alone = [record.iters for record in run(config)[0]]
    assert any(iters < 24 for iters in alone)

    def work(rank):
        parallel.start('pytorch', 'test')
        records, _ = run(config, numbers=list(range(24))[rank::2])
        assert [record.iters for record in records] == alone
        parallel.stop()

    group = Ranks(2, work, tmp_path)
    try:
        assert group.wait(120) == [0, 0], group.errors()
    finally:
        group.kill()


@pytest.mark.parametrize('given, words', [
    (5, 'early_stop=5 is neither None nor a dict'),
    (dict(evry=5), 'early_stop.evry is not a known key'),
    (dict(every=0), 'early_stop.every=0 is not an integer of 1'),
    (dict(patience=1.5), 'early_stop.patience=1.5 is not an integer of 1'),
    (dict(min_delta=1), 'early_stop.min_delta=1 is not from 0 to below 1'),
], ids=str)
def test_a_mistake_is_named(given, words):
    with pytest.raises(UsageError, match=words):
        UnitConfig(early_stop=given)
