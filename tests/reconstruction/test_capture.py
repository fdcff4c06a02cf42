"""Streams: states at unit boundaries."""
import torch
from toy_chains import chain_of, stream, toy

from pfcr_mm.models import State
from pfcr_mm.reconstruction.cache import FeatureCache
from pfcr_mm.reconstruction.capture import Stream, advance, split


def test_buckets_hold_equal_shapes_and_meta():
    states = [State((torch.zeros(1, n, 2), ), meta)
              for n, meta in [(3, 'a'), (4, 'a'), (3, 'a'), (3, 'b')]]
    assert sorted(Stream(states).buckets()) == [[0, 2], [1], [3]]


def test_batch_is_float32_on_any_storage():
    shelf = FeatureCache(torch.float16).shelf()
    half = Stream([shelf.keep(State((torch.full((1, 2), i + 0.5), ), 7)) for i in range(3)])
    assert half.states[0].tensors[0].dtype == torch.float16
    batch = half.batch([2, 0], torch.device('cpu'))
    assert batch.tensors[0].dtype == torch.float32 and batch.meta == 7
    assert batch.tensors[0].tolist() == [[2.5, 2.5], [0.5, 0.5]]


def test_advance_keeps_the_order_of_images():
    model, _, inputs = toy(images=10)
    states, sides = advance(chain_of(model), stream(inputs), 0, 8, torch.device('cpu'), 3)
    assert len(states) == len(sides) == 10
    for x, state in zip(inputs, states.states):
        torch.testing.assert_close(state.tensors[0], model(x))
        assert state.meta == x.shape[1]


def test_advance_in_two_steps_is_advancing_at_once():
    model, _, inputs = toy(images=5)
    chain, device = chain_of(model), torch.device('cpu')
    half, _ = advance(chain, stream(inputs), 0, 3, device)
    whole, _ = advance(chain, half, 3, 8, device)
    expected, _ = advance(chain, stream(inputs), 0, 8, device)
    for a, b in zip(whole.states, expected.states):
        assert torch.equal(a.tensors[0], b.tensors[0])


def test_advance_splits_entries_of_many_rows():
    """RoI streams: one entry an image, any number of rows."""
    model, _, _ = toy(images=1)
    rows = [torch.randn(n, 5, 12) for n in (3, 1, 4)]
    states, _ = advance(chain_of(model), Stream([State((x, )) for x in rows]), 0, 2,
                        torch.device('cpu'))
    for x, state in zip(rows, states.states):
        torch.testing.assert_close(state.tensors[0], model.branches[1](model.branches[0](x)))


def test_held_out_images_are_apart_from_those_learned_on():
    images = Stream([State((torch.zeros(1), )) for _ in range(12)])
    learn, accept = split(images.numbers, 3)
    assert learn == list(range(9)) and accept == [9, 10, 11]
    assert split([3, 4, 5], 2) == ([3], [4, 5])
    for held_out in (0, 2, 4):  # none, or too few to hold any out
        assert split(range(2), held_out) == ([0, 1], [0, 1])
