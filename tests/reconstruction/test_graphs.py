"""Steps that are recorded once and replayed."""
import pytest
import torch
from marks import needs_gpu
from torch import nn
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm.models import State
from pfcr_mm.models.recording import is_recorded
from pfcr_mm.reconstruction import ChainReconstructor, Stage, UnitConfig, build_schedule, graphs
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


@pytest.mark.parametrize('cause', ['a step waits', 'recording fails'])
def test_what_cannot_be_recorded_goes_on_as_before(cause, monkeypatch):
    def fails(*_):
        raise RuntimeError('called a synchronizing CUDA operation')

    calls, weight = [], nn.Parameter(torch.ones(()))
    found = steps(calls)
    found.parameters = [weight]
    monkeypatch.setattr(graphs, '_waiting_is_an_error',
                        fails if cause == 'a step waits' else torch.no_grad)
    monkeypatch.setattr(graphs, '_Graph', fails)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    weight.grad = torch.ones(())  # half of a step that broke off
    for _ in range(BEFORE + 3):
        assert found(*batch(3)).item() == 1
    assert calls == [3] * (BEFORE + 3) and not found.graphs and weight.grad is None


def test_an_error_of_the_step_itself_is_not_hidden(monkeypatch):
    def fails(state, target):
        raise RuntimeError('shapes differ')

    monkeypatch.setattr(graphs, '_waiting_is_an_error', torch.no_grad)
    found = StepGraphs(fails, [])
    for _ in range(BEFORE):
        with pytest.raises(RuntimeError, match='shapes differ'):
            found(*batch(3))


def test_nothing_is_recorded_on_a_cpu():
    assert not is_recorded('cpu')


def learn(device, images=24, level='block', **options):
    model, teacher, inputs = toy(images=images)
    model.to(device), teacher.to(device)
    runner = ChainReconstructor(
        chain_of(model), chain_of(teacher), stream(inputs), stream(inputs), device, 4, 0)
    config = UnitConfig(iters=30, batch_size=4, weight_lr=3e-3, scale_lr=1e-2, **options)
    records = runner.run(
        build_schedule(runner.chain, ['leaf', level]), lambda unit: config, FINAL)
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
def test_no_stream_that_batches_come_by_is_recorded():
    """However many streams others have asked for: torch hands the same ones out again."""
    device = torch.device('cuda', 0)
    loading, recording = side_streams(device)
    for _ in range(100):
        torch.cuda.Stream(device)
        assert side_streams(torch.device('cuda')) == (loading, recording)
    assert loading.cuda_stream != recording.cuda_stream


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
    assert not found.possible and len(calls) == BEFORE + 3
