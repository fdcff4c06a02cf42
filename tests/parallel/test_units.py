"""Units reconstructed by several processes: as one does it, whatever befalls one of them."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from ranks import Ranks
from toy_chains import chain_of, learned_state, toy

from pfcr_mm import parallel
from pfcr_mm.errors import UsageError
from pfcr_mm.models.chain import Chain, State
from pfcr_mm.modules import set_quantization
from pfcr_mm.reconstruction import ChainReconstructor, Faults, Stage, UnitConfig, build_schedule
from pfcr_mm.reconstruction.build_loss import check_shareable, losses_in, parse_loss
from pfcr_mm.reconstruction.cache import FeatureCache
from pfcr_mm.reconstruction.capture import Stream
from pfcr_mm.reconstruction.losses import MSELoss
from pfcr_mm.reconstruction.noise import ImageNoise
from pfcr_mm.reconstruction.precision import Precision
from pfcr_mm.registry import RECONSTRUCTION_LOSSES

CONFIG = UnitConfig(iters=5, batch_size=4, weight_lr=3e-3, adaround_lr=3e-2, scale_lr=1e-2,
                    keep_prob=0.7, input_mix=0.6)
# Images of each process: the second has most, the third none.
SHARES = ([0, 3, 6, 9, 12, 15], [1, 2, 4, 5, 7, 8, 10, 11, 13, 14], [])


@pytest.fixture()
def shared(tmp_path):
    """shared(work): run work(rank) in processes of a group; all must succeed."""
    made = []

    def run(work, size=3):

        def whole(rank):
            parallel.start('pytorch', 'test')
            work(rank)
            parallel.stop()

        made.append(Ranks(size, whole, tmp_path))
        assert made[-1].wait(120) == [0] * size, made[-1].errors()

    yield run
    for group in made:
        group.kill()


def regions(images=16):
    """Inputs of 1 to 3 rows an image, as RoIs are."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1 + i % 3, 16, 12, generator=generator) for i in range(images)]


def run(model, teacher, inputs, numbers, tell=print, quantized_inputs=None, config=CONFIG):
    quantized, floating = (
        Stream([State((found[i], )) for i in numbers], numbers=numbers)
        for found in (quantized_inputs or inputs, inputs))
    # of several processes each has files of its own
    cache = FeatureCache(memory_mb=0) if parallel.world_size() > 1 else None
    piece = ChainReconstructor(
        chain_of(model), chain_of(teacher), quantized, floating, torch.device('cpu'), 4, 0, cache,
        Faults(tell))
    return piece.run(build_schedule(piece.chain, ['leaf', 'block']), lambda unit: config,
                     Stage(2, True, True, ('leaf', 'block')))


def losses(records):
    return [loss for record in records for loss in (record.loss_before, record.loss_after)]


@pytest.mark.parametrize('rounding', ['latent', 'adaround'])
def test_three_processes_learn_what_one_does(shared, rounding, monkeypatch):
    """Shares of all sizes, QDrop, and one process that has memory for one image."""
    inputs = regions()
    alone, teacher, _ = toy(rounding, branches=2)
    expected, learned = run(alone, teacher, inputs, range(16)), learned_state(alone)
    assert any(record.accepted for record in expected)
    real = Chain.run

    def run_chain(self, state, start=0, stop=None):
        if torch.is_grad_enabled() and state.tensors[0].shape[0] > 3:
            raise MemoryError
        return real(self, state, start, stop)

    def work(rank):
        if rank == 1:
            monkeypatch.setattr(Chain, 'run', run_chain)
        model, teacher, _ = toy(rounding, branches=2)
        told = []
        records = run(model, teacher, inputs, SHARES[rank], told.append)
        assert bool(told) == (rank == 1)
        assert losses(records) == pytest.approx(losses(expected), rel=1e-4)
        assert [r.accepted for r in records] == [r.accepted for r in expected]
        found = learned_state(model)
        for key, value in learned.items():
            assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-4), key
        same = [torch.zeros_like(v).copy_(v) for v in found.values()]
        parallel.copy_from_main(same)
        assert all(torch.equal(a, b) for a, b in zip(same, found.values()))  # to the bit

    shared(work)


@pytest.mark.parametrize('rounding', ['latent', 'adaround'])
def test_half_precision_in_three_processes(shared, rounding, monkeypatch):
    """Also in the one that holds no image: loss scale and steps left out are the same in all."""
    inputs = regions()
    config = replace(CONFIG, autocast='float16')
    monkeypatch.setattr(MSELoss, '__call__', lambda self, outputs, targets: steep(
        (outputs[0] - targets[0]).square().mean()))
    config = replace(config, loss='mse')
    alone, teacher, _ = toy(rounding, branches=2)
    expected = run(alone, teacher, inputs, range(16), config=config)
    seen = []
    real = Precision.overflows

    def overflows(self):
        found = real(self)
        seen.append((self.scaler.get_scale(), self.left_out))
        return found

    monkeypatch.setattr(Precision, 'overflows', overflows)

    def work(rank):
        model, teacher, _ = toy(rounding, branches=2)
        records = run(model, teacher, inputs, SHARES[rank], config=config)
        assert losses(records) == pytest.approx(losses(expected), rel=1e-2)
        assert seen and any(count for _, count in seen)
        assert parallel.gather(seen) == [seen] * 3

    shared(work)


def steep(loss):
    """A loss whose gradients overflow float16 at the scale that it begins with."""
    return loss + (loss - loss.detach()) * 1e5


MIXED = dict(type='mixed', terms=[dict(type='layers', weight=0.5), dict(type='aph'),
                                  dict(type='head_kl', other=dict(
                                      type='mixed', terms=[dict(type='mse')]))])


def tokens(images=16):
    """Inputs of two sizes, so that APH weighs channels; the second process has all of one."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 24 if i in (1, 7, 13) else 16, 12, generator=generator)
            for i in range(images)]


def pair():
    """A quantized toy and its float twin, which has the same layers."""
    model, _, _ = toy(branches=4)
    twin = copy.deepcopy(model)
    set_quantization(twin, False, False)
    return model, twin


@pytest.mark.parametrize('loss', ['layers', 'aph', 'mse_final', MIXED],
                         ids=['layers', 'aph', 'mse_final', 'mixed'])
@pytest.mark.parametrize('size, make', [(2, tokens), (3, regions)],
                         ids=['2, of two sizes', '3, one has nothing'])
def test_guided_losses_are_those_of_one_process(shared, loss, size, make):
    """What a loss takes from targets and from its first batch is the same whoever has what."""
    inputs, config = make(), replace(CONFIG, loss=loss)
    alone, teacher = pair()
    expected = run(alone, teacher, inputs, range(16), config=config)
    assert any(record.accepted for record in expected) and len(expected) == 6
    known = losses(expected)

    def work(rank):
        for part in losses_in(loss):
            check_shareable(parse_loss(part)[0], part)
        model, teacher = pair()
        records = run(model, teacher, inputs, SHARES[rank], config=config)
        assert losses(records) == pytest.approx(known, rel=1e-4)
        assert [r.accepted for r in records] == [r.accepted for r in expected]

    shared(work, size)


def test_a_term_that_processes_cannot_share_is_found_before_any_work():

    @RECONSTRUCTION_LOSSES.register_module(name='own_of_units_test', force=True)
    class Own(MSELoss):
        shares_batches = False

    nested = dict(type='mixed', terms=[dict(type='aph', other='own_of_units_test'),
                                       dict(type='mse', weight=2)])
    found = [parse_loss(part)[0] for part in losses_in(nested)]
    assert Own in found and MSELoss in found and len(found) == 4
    assert [getattr(cls, 'shares_batches', False) is False for cls in found].count(True) == 1


def test_what_one_process_cannot_compute_is_told_by_all(shared):
    """Only the second process sees the image; the words are those of one process."""
    spoilt, inputs = regions(), regions()
    spoilt[4][:] = math.nan
    model, teacher, _ = toy(branches=1)
    expected = []
    assert not all(r.accepted for r in run(model, teacher, inputs, range(16), expected.append,
                                           spoilt))
    assert 'NaN or Inf is in its input already' in expected[0]

    def work(rank):
        model, teacher, _ = toy(branches=1)
        told = []
        run(model, teacher, inputs, SHARES[rank], told.append, spoilt)
        assert told == expected

    shared(work)


def test_what_processes_cannot_share_is_refused(shared):

    class Own(MSELoss):
        shares_batches = False

    check_shareable(Own, 'own')  # one process may
    noise = ImageNoise(0)
    noise.begin('inside', 0, [1, 2], [1, 1])

    def work(rank):
        check_shareable(MSELoss, 'mse')
        with pytest.raises(UsageError, match="loss='own' cannot be computed by several"):
            check_shareable(Own, 'own')
        with pytest.raises(UsageError, match='keep_prob'):
            noise(torch.zeros(3, 4), 0.5)

    shared(work)
