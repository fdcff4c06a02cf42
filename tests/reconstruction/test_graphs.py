"""Steps that are recorded once and replayed."""
import pytest
import torch
from marks import needs_gpu
from torch import nn
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm.errors import FaultError
from pfcr_mm.models import State
from pfcr_mm.reconstruction import ChainReconstructor, Stage, UnitConfig, build_schedule, graphs
from pfcr_mm.reconstruction.faults import Faults
from pfcr_mm.reconstruction.feed import side_streams
from pfcr_mm.reconstruction.graphs import BEFORE, StepGraphs

FINAL = Stage(2, True, True, ('leaf', 'block'))


def batch(tokens, value=1.0, device='cpu'):
    return State((torch.full((2, tokens), value, device=device), ), tokens), (
        torch.zeros(2, tokens, device=device), )


def steps(calls):
    def compute(state, target):
        calls.append(state.meta)
        return (state.tensors[0] - target[0]).square().mean()

    return StepGraphs(compute, [])


class Recorded:
    """Stands in for a graph."""

    def __init__(self, compute, parameters, state, target, pool):
        self.graph, self.made = self, compute(state, target)

    def pool(self):
        return 'pool'

    def replay(self, state, target):
        return 'replayed'


def test_shapes_that_come_again_are_recorded(monkeypatch):
    calls = []
    found = steps(calls)
    monkeypatch.setattr(graphs, '_Graph', Recorded)
    monkeypatch.setattr(graphs, '_waiting_is_an_error', torch.no_grad)
    for _ in range(BEFORE):
        assert found(*batch(3)).item() == 1
    assert found(*batch(5)).item() == 1
    assert [found(*batch(3)), found(*batch(3))] == ['replayed'] * 2
    assert calls == [3] * BEFORE + [5] + [3]  # the last one was recorded
    assert list(found.graphs) == [(((2, 3), ), 3, ((2, 3), ))] and found.pool == 'pool'


@pytest.fixture
def no_gpu_is_asked(monkeypatch):
    monkeypatch.setattr(graphs, '_waiting_is_an_error', torch.no_grad)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)


def test_at_most_so_many_shapes(no_gpu_is_asked, monkeypatch):
    monkeypatch.setattr(graphs, '_Graph', Recorded)
    monkeypatch.setattr(graphs, 'MOST', 2)
    calls = []
    found = steps(calls)
    for tokens in (3, 4, 5):
        for _ in range(BEFORE + 2):
            last = found(*batch(tokens))
    assert len(found.graphs) == 2 and last.item() == 1 and found.obstacle is None


@pytest.mark.parametrize('cause', ['waits', 'memory'])
def test_what_cannot_be_recorded_goes_on_as_before(cause, no_gpu_is_asked, monkeypatch):
    def fails(*_):
        raise (torch.OutOfMemoryError('no memory') if cause == 'memory'
               else RuntimeError('called a synchronizing CUDA operation'))

    calls, weight = [], nn.Parameter(torch.ones(()))
    found = steps(calls)
    found.parameters = [weight]
    if cause == 'waits':
        monkeypatch.setattr(graphs, '_waiting_is_an_error', fails)
    monkeypatch.setattr(graphs, '_Graph', fails)
    weight.grad = torch.ones(())  # half of a step that broke off
    for _ in range(BEFORE + 3):
        assert found(*batch(3)).item() == 1
    assert calls == [3] * (BEFORE + 3) and not found.graphs and weight.grad is None
    assert cause in found.obstacle


def test_recording_that_breaks_off_ends_the_run(no_gpu_is_asked, monkeypatch):
    def fails(*_):
        raise RuntimeError('operation not permitted when stream is capturing\nmore')

    monkeypatch.setattr(graphs, '_Graph', fails)
    found = steps([])
    for _ in range(BEFORE):
        found(*batch(3))
    with pytest.raises(FaultError, match=r'not permitted.*cuda_graphs=False.*--resume'):
        found(*batch(3))


def test_that_nothing_is_recorded_is_told_once():
    told = []
    learn(torch.device('cpu'), faults=Faults(tell=told.append), cuda_graphs=True)
    assert told == ['steps are not recorded, whatever cuda_graphs says: there is no GPU']


def test_an_error_of_the_step_itself_is_not_hidden(monkeypatch):
    def fails(state, target):
        raise RuntimeError('shapes differ')

    monkeypatch.setattr(graphs, '_waiting_is_an_error', torch.no_grad)
    found = StepGraphs(fails, [])
    for _ in range(BEFORE):
        with pytest.raises(RuntimeError, match='shapes differ'):
            found(*batch(3))


def learn(device, faults=None, **options):
    model, teacher, inputs = toy()
    model.to(device), teacher.to(device)
    runner = ChainReconstructor(
        chain_of(model), chain_of(teacher), stream(inputs), stream(inputs), device, 4, 0,
        faults=faults)
    config = UnitConfig(iters=30, batch_size=4, weight_lr=3e-3, scale_lr=1e-2, **options)
    records = runner.run(
        build_schedule(runner.chain, ['leaf', 'block']), lambda unit: config, FINAL)
    return [r.loss_after for r in records], learned_state(model)


@needs_gpu
@pytest.mark.parametrize('options', [
    {}, dict(clip_grad=0.1), dict(norm_lr=1e-3, loss='mse'), dict(autocast='bfloat16')],
    ids=['plain', 'clipped', 'norms', 'bfloat16'])
def test_the_same_is_learned(options, monkeypatch):
    device, made = torch.device('cuda', 0), []
    real = graphs._Graph
    monkeypatch.setattr(graphs, '_Graph', lambda *a: made.append(a) or real(*a))
    one_by_one = learn(device, **options)
    assert not made
    recorded = learn(device, cuda_graphs=True, **options)
    assert len(made) >= 8  # of two sizes, a unit
    assert recorded[0] == pytest.approx(one_by_one[0], rel=1e-3)
    for name, value in one_by_one[1].items():
        torch.testing.assert_close(recorded[1][name], value, rtol=1e-2, atol=1e-3)


@needs_gpu
def test_batches_do_not_come_by_the_stream_that_is_recorded():
    loading, recording = side_streams(torch.device('cuda'))
    assert loading.cuda_stream != recording.cuda_stream
    assert side_streams(torch.device('cuda', 0)) == (loading, recording)


@needs_gpu
def test_a_step_that_waits_is_told_beforehand():
    calls, weight = [], nn.Parameter(torch.ones((), device='cuda'))

    def compute(state, target):
        calls.append(1)
        loss = (weight * state.tensors[0] - target[0]).square().mean()
        loss.backward()
        loss.item()
        return loss.detach()

    found = StepGraphs(compute, [weight])
    for _ in range(BEFORE + 2):
        weight.grad = None
        assert found(*batch(3, device='cuda')).item() == 1
        assert weight.grad.item() == 2
    assert 'waits' in found.obstacle and len(calls) == BEFORE + 3
