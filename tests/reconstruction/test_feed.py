"""Batches and how they reach a device."""
import threading

import pytest
import torch
from marks import needs_gpu
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm.reconstruction import ChainReconstructor, Stage, UnitConfig, build_schedule
from pfcr_mm.reconstruction.feed import collate, made_ahead

CPU, GPU = torch.device('cpu'), torch.device('cuda', 0)


def test_on_a_cpu_nothing_is_made_before_it_is_wanted():
    made = []

    def make(item):
        made.append(item)
        return 10 * item, ()

    results = made_ahead(make, iter([1, 2, 3]), CPU)
    assert next(results) == 10 and made == [1]
    assert list(results) == [20, 30]


def test_half_precision_comes_out_as_float():
    found, = collate([(torch.ones(1, 3).half(), ), (torch.zeros(2, 3).half(), )], 'cpu')
    assert found.dtype is torch.float32 and found.tolist() == [[1] * 3, [0] * 3, [0] * 3]


@needs_gpu
@pytest.mark.parametrize('form', [torch.contiguous_format, torch.channels_last])
def test_collated_on_a_gpu(form):
    parts = [torch.randn(1, 8, 4, 5).to(memory_format=form).to(torch.bfloat16) for _ in range(3)]
    found, = collate([(part, ) for part in parts], GPU)
    want = torch.cat(parts).float()
    assert torch.equal(found.cpu(), want) and found.stride() == want.stride()


@needs_gpu
def test_made_ahead_on_a_gpu():
    """Each batch is whole when it is used, and its memory is not given away before that."""
    data = [torch.full((1, 2**22), float(i)) for i in range(12)]

    def make(item):
        batch = collate([(data[item], )], GPU)
        return batch, batch

    errors = []
    for number, (batch, ) in enumerate(made_ahead(make, range(12), GPU)):
        total = batch
        for _ in range(20):  # keeps the GPU behind
            total = total * 1.0
        errors.append((total - number).abs().amax())
        del batch, total  # its memory may be taken for the next
    assert number == 11 and torch.stack(errors).tolist() == [0] * 12


@needs_gpu
def test_an_error_reaches_the_one_who_waits():
    def make(item):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(made_ahead(make, [1, 2], GPU))


@needs_gpu
def test_what_does_not_fit_beside_the_last_is_made_when_it_is_wanted():
    def make(item):
        if item == 1 and threading.current_thread() is not threading.main_thread():
            raise torch.OutOfMemoryError('no memory')
        batch = collate([(torch.full((1, 3), float(item)), )], GPU)
        return batch, batch

    found = [batch[0, 0].item() for batch, in made_ahead(make, range(4), GPU)]
    assert found == [0, 1, 2, 3]


@needs_gpu
@pytest.mark.parametrize('options', [{}, dict(keep_prob=0.5, input_mix=0.5)],
                         ids=['plain', 'qdrop'])
def test_units_learn_on_a_gpu_as_on_a_cpu(options):
    config = UnitConfig(iters=30, batch_size=4, weight_lr=3e-3, scale_lr=1e-2, **options)
    found = {}
    for turn, device in enumerate((CPU, GPU, GPU)):
        model, teacher, inputs = toy()
        model.to(device), teacher.to(device)
        runner = ChainReconstructor(
            chain_of(model), chain_of(teacher), stream(inputs), stream(inputs), device, 4, 0)
        records = runner.run(build_schedule(runner.chain, ['leaf', 'block']), lambda unit: config,
                             Stage(2, True, True, ('leaf', 'block')))
        found[turn] = [r.loss_after for r in records], learned_state(model)
    if not options:  # else each device has its own masks
        assert found[1][0][0] == pytest.approx(found[0][0][0], rel=0.01)
    assert found[1][0] == pytest.approx(found[0][0], rel=0.3)  # small differences grow
    assert all(torch.equal(a, b) for a, b in zip(found[1][1].values(), found[2][1].values()))
