"""What processes say to each other, and how they end."""
import os
import signal
import time

import pytest
import torch
from ranks import Ranks

from pfcr_mm import parallel
from pfcr_mm.errors import UsageError
from pfcr_mm.parallel.shard import numbers_of
from pfcr_mm.reconstruction.calibrate import Reservoir
from pfcr_mm.reconstruction.losses import ChannelMSELoss, MSELoss


@pytest.fixture()
def ranks(tmp_path):
    """ranks(work, size): run work(rank) in processes of a group; none is left behind."""
    made = []

    def start(work, size=3):

        def run(rank):
            parallel.start('pytorch', 'test', '; try again')
            work(rank)
            parallel.stop()

        made.append(Ranks(size, run, tmp_path / str(len(made))))
        return made[-1]

    yield start
    for group in made:
        group.kill()


def test_one_process_talks_to_nobody():
    assert parallel.gather(5) == [5] and parallel.total(2.5) == 2.5
    assert parallel.highest(3) == 3 and parallel.from_main(lambda: 'x') == 'x'
    left = torch.ones(2)
    parallel.sum_in_place([left])
    assert left.tolist() == [1, 1]
    assert parallel.whole(['a', 'b']) == ['a', 'b'] and numbers_of('ab') == [0, 1]
    assert parallel.is_main() and parallel.world_size() == 1
    parallel.start('none', 'test')
    parallel.end('not ended', 1)
    parallel.stop()


def test_what_all_say_is_put_together(ranks):
    """Every process checks; an empty one is among them."""

    def work(rank):
        assert (parallel.rank(), parallel.world_size()) == (rank, 3)
        assert parallel.gather(rank * 10) == [0, 10, 20]
        assert parallel.total(torch.tensor([1., rank])).tolist() == [3, 3]
        assert parallel.highest(-rank) == 0
        assert parallel.from_main(lambda: f'from {rank}') == 'from 0'
        shard = parallel.Shard('abcde'[rank::3], range(5)[rank::3])
        assert parallel.whole(shard) == list('abcde')

        first, second, third = (torch.nn.Parameter(torch.ones(n)) for n in (3, 2, 1))
        found = parallel.GradientSum([first, second, third])
        if rank:  # 0 has none of the batch
            found.backward(rank * first.sum() + (second.sum() if rank == 2 else 0))
        assert found.settle() == 11
        assert first.grad.tolist() == [3] * 3 and second.grad.tolist() == [1] * 2
        assert third.grad is None

        copied = [torch.full((2, 2), float(rank)), torch.full((1, ), rank + 0.5).double()]
        parallel.copy_from_main(copied)
        assert copied[0].tolist() == [[0, 0], [0, 0]] and copied[1].tolist() == [0.5]

    assert ranks(work).wait(60) == [0, 0, 0]


def test_statistics_are_those_of_one_process(ranks):
    """Samples, extremes and losses of two images in three processes, to the bit or nearly."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(40, 6, generator=generator) * (i + 1) for i in range(2)]

    def reservoir(numbers):
        found = Reservoir(30)
        for i in numbers:
            found.add(images[i], images[i].amin(0), images[i].amax(0),
                      torch.Generator().manual_seed(i))
        found.settle()
        return found

    alone = reservoir([1, 0])  # in any order
    assert len(alone.rows) == 30
    losses = [kind([(x, ) for x in images], -1).weights[0] for kind in (MSELoss, ChannelMSELoss)]

    def work(rank):
        own = list(range(2))[rank::3]
        found = reservoir(own)
        for name in ('rows', 'keys', 'low', 'high'):
            assert torch.equal(getattr(found, name), getattr(alone, name))
        for kind, weight in zip((MSELoss, ChannelMSELoss), losses):
            shared = kind([(images[i], ) for i in own], -1)
            assert torch.allclose(shared.weights[0], weight, rtol=1e-6)
        nothing = Reservoir(30)
        nothing.settle()
        assert nothing.rows is None

    assert ranks(work).wait(60) == [0, 0, 0]


def gather_as_tools_do(value):
    """A collective breaks where a process has gone; what is behind it is told first."""
    try:
        parallel.gather(value)
    except RuntimeError as error:
        parallel.end(str(error), 1, 5.0)


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_all(ranks, victim):
    """The others are busy alone, or wait for each other: all end, and say why."""

    def work(rank):
        if rank == victim:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 2:
            time.sleep(60)
        gather_as_tools_do(rank)

    group = ranks(work)
    codes = group.wait(30)
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
    for rank, printed in enumerate(group.errors()):
        if rank != victim:
            line = f'test: error: process {victim} of 3 (pid {group.pids[victim]} on '
            assert line in printed and 'has died; try again' in printed


def test_one_mistake_ends_all_with_one_line(ranks):
    """Whoever makes it; two at once are one."""

    def work(rank):
        if rank:
            parallel.end('image x is missing', 2)
        gather_as_tools_do(rank)

    group = ranks(work)
    assert group.wait(30) == [2, 2, 2]
    assert group.errors() == ['test: error: image x is missing\n', '', '']


@pytest.mark.parametrize(('launcher', 'values', 'says'), [
    ('pytorch', {}, 'RANK is not set; start with tools/dist_quant.sh or torchrun'),
    ('slurm', dict(SLURM_PROCID='0'), 'SLURM_NTASKS is not set; start with tools/slurm_quant.sh'),
    ('mpi', dict(OMPI_COMM_WORLD_RANK='x'), "OMPI_COMM_WORLD_RANK is 'x'"),
    ('mpi', dict(OMPI_COMM_WORLD_RANK='0', OMPI_COMM_WORLD_SIZE='1',
                 OMPI_COMM_WORLD_LOCAL_RANK='0'), 'MASTER_ADDR is not set'),
    ('slurm', dict(SLURM_PROCID='0', SLURM_NTASKS='1', PATH=''), 'set MASTER_ADDR'),
], ids=['pytorch', 'slurm', 'mpi', 'mpi-address', 'slurm-address'])
def test_no_launcher_there(monkeypatch, launcher, values, says):
    for name in [n for n in os.environ if n.startswith(('SLURM', 'OMPI', 'MASTER_', 'RANK'))]:
        monkeypatch.delenv(name)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')  # undone afterwards
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=says):
        parallel.start(launcher, 'test')
