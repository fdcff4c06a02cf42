"""The cache: the same from memory and from files, and nothing left behind."""
import copy
import errno
import gc
import mmap
import os
import weakref

import pytest
import torch
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm.errors import FaultError, UsageError
from pfcr_mm.models import State
from pfcr_mm.modules import set_quantization
from pfcr_mm.reconstruction import ChainReconstructor, Stage, UnitConfig, build_schedule, cache
from pfcr_mm.reconstruction.cache import FeatureCache, Shelf
from pfcr_mm.reconstruction.capture import Stream, Targets
from pfcr_mm.reconstruction.feed import looking_ahead

LEVELS = ['leaf', 'block', 'stage', 'backbone']
CONFIG = UnitConfig(iters=3, batch_size=4, weight_lr=3e-3, input_mix=0.5, keep_prob=0.8)


def open_files():
    """Numbers of this process's open files."""
    return set(os.listdir('/proc/self/fd'))


def in_file(kept):
    return kept._layout is not None


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_a_file_gives_back_bytes_shapes_and_strides(dtype):
    maps = (torch.randn(2, 3, 4, 5) * 9).to(dtype)
    tensors = (maps, maps.permute(0, 2, 3, 1), maps[:0], maps[0, 0, 0, :3],
               maps.to(memory_format=torch.channels_last))
    kept = FeatureCache(memory_mb=0).shelf().keep(State(tensors, (4, 5)))
    assert in_file(kept) and kept.meta == (4, 5) and kept.rows == 2
    for given, found, shape in zip(tensors, kept.tensors, kept.shapes):
        assert found.dtype == dtype and found.shape == given.shape == shape
        assert torch.equal(found, given)
        assert found.numel() == 0 or found.stride() == given.stride()


def test_what_has_gaps_is_packed():
    x = torch.arange(24.).view(4, 6)
    for memory_mb in (None, 0):
        found, = FeatureCache(memory_mb=memory_mb).shelf().keep(State((x[:, :2], ))).tensors
        assert torch.equal(found, x[:, :2]) and found.is_contiguous()


def test_what_comes_next_is_read_ahead(monkeypatch):
    """Each state of the next batch, once, and before it is looked at; none in memory is."""
    told = []
    monkeypatch.setattr(os, 'posix_fadvise', lambda *args: told.append(args[1:]), raising=False)
    store = FeatureCache(memory_mb=400 * 2 / 2**20)  # two states
    shelf = store.shelf()
    states = Stream([shelf.keep(State((torch.randn(1, 100), ))) for _ in range(9)])
    seen = [(indices, len(told)) for indices, _ in states.batches(3, 'cpu')]
    assert seen == [([0, 1, 2], 3), ([3, 4, 5], 6), ([6, 7, 8], 6)]
    pages = [page * mmap.ALLOCATIONGRANULARITY for page in range(1, 7)]
    assert told == [(page, 400, os.POSIX_FADV_WILLNEED) for page in pages]
    states.ahead([0, 1])
    Targets(states, states).ahead([2])
    assert [start for start, *_ in told[6:]] == [0, 0]


def test_nothing_comes_after_the_last():
    assert list(looking_ahead([])) == []
    assert list(looking_ahead(iter([[3], [4], [5]]))) == [([3], [4]), ([4], [5]), ([5], None)]


def test_the_limit_counts_what_is_there_now():
    store = FeatureCache(memory_mb=8 * 100 * 4 / 2**20)  # eight states
    first, second = store.shelf(), store.shelf()
    kept = [first.keep(State((torch.randn(1, 100), ))) for _ in range(6)]
    more = [second.keep(State((torch.randn(1, 100), ))) for _ in range(4)]
    assert [in_file(k) for k in kept + more] == [False] * 8 + [True] * 2
    assert store.held == 8 * 400
    del first, kept[1:]
    assert store.held == 8 * 400  # one of them is still there
    del kept[:]
    assert store.held == 2 * 400
    assert not in_file(store.shelf().keep(State((torch.randn(1, 100), ))))


def test_half_precision_overflow_is_told():
    for memory_mb in (None, 0):
        with pytest.raises(UsageError, match='cache_dtype'):
            FeatureCache(torch.float16, memory_mb).shelf().keep(State((torch.tensor([1e6]), )))


def test_files_have_no_names_and_go_with_their_states(tmp_path):
    before = open_files()
    store = FeatureCache(memory_mb=0, folder=tmp_path / 'new')
    store.check()
    kept = [store.shelf().keep(State((torch.ones(1, 1000), ))) for _ in range(3)]
    assert len(open_files() - before) == 3
    assert list(tmp_path.rglob('*')) == [tmp_path / 'new']
    seen = kept[0].tensors[0]
    del kept
    assert seen.sum() == 1000  # a mapping outlives the states
    del seen
    assert open_files() == before


def test_no_more_is_mapped_than_is_looked_at(monkeypatch):
    """All the work on units, their losses included: no more states than a batch has."""
    model, teacher, inputs = toy(images=24)
    alive, most, read = set(), [0], Shelf.map

    def counted(self, start, stop):
        found = read(self, start, stop)
        alive.add(id(found))
        weakref.finalize(found, alive.discard, id(found))
        most.append(len(alive))
        return found

    monkeypatch.setattr(Shelf, 'map', counted)
    piece = ChainReconstructor(
        chain_of(model), chain_of(teacher), stream(inputs), stream(inputs), torch.device('cpu'),
        4, 0, FeatureCache(memory_mb=0))
    piece.run(build_schedule(piece.chain, ['leaf', 'stage']), lambda unit: CONFIG,
              Stage(1, True, True, ()))
    assert 1 < max(most) <= 2 * 8  # 8 images, each an input and a target
    assert not alive


@pytest.mark.parametrize('loss', ['channel_mse', 'mse', 'final', 'layers', dict(
    type='mixed', terms=[dict(type='channel_mse'), dict(type='aph')])], ids=str)
@pytest.mark.parametrize('memory_mb', [0, 0.02], ids=['files', 'some in files'])
def test_files_change_no_bit(memory_mb, loss):
    found, config = [], UnitConfig(**{**vars(CONFIG), 'loss': loss})
    for limit in (None, memory_mb):
        model, _, inputs = toy(images=12, branches=4)
        teacher = copy.deepcopy(model)
        set_quantization(teacher, False, False)
        piece = ChainReconstructor(
            chain_of(model), chain_of(teacher), stream(inputs), stream(inputs),
            torch.device('cpu'), 4, 0, FeatureCache(torch.float16, limit))
        records = piece.run(build_schedule(piece.chain, LEVELS), lambda unit: config,
                            Stage(1, True, True, ()))
        found.append(([(r.loss_before, r.loss_after) for r in records], learned_state(model)))
    assert found[0][0] == found[1][0]
    for key, value in found[0][1].items():
        assert torch.equal(value, found[1][1][key]), key


def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    write, room = os.write, [3000]

    def until_full(handle, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, 'No space left on device')
        count = write(handle, data[:room[0]])
        room[0] -= count
        return count

    before = open_files()
    shelf = FeatureCache(memory_mb=0, folder=tmp_path).shelf()
    monkeypatch.setattr(cache.os, 'write', until_full)
    shelf.keep(State((torch.ones(1, 500), )))
    with pytest.raises(FaultError, match=f'feature cache in {tmp_path}.*No space left') as error:
        shelf.keep(State((torch.ones(1, 500), )))
    assert '\n' not in str(error.value) and 'cache_dir' in str(error.value)
    del shelf, error
    gc.collect()
    assert open_files() == before


def test_a_folder_that_cannot_be_is_told_before(tmp_path):
    (tmp_path / 'file').write_text('')
    FeatureCache(folder=tmp_path / 'file' / 'cache').check()  # not needed without a limit
    with pytest.raises(UsageError, match='cache_dir=.*file/cache'):
        FeatureCache(memory_mb=5, folder=tmp_path / 'file' / 'cache').check()
