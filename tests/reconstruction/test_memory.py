"""The memory estimate against what a reconstruction really holds."""
import pytest
import torch
from tiny_models import images_of
from toy_chains import chain_of, stream, toy

from pfcr_mm.models import State, part_chains, whole_chain
from pfcr_mm.models.whole import WHOLE
from pfcr_mm.reconstruction import (
    ChainReconstructor,
    UnitConfig,
    build_schedule,
    memory,
    part_streams,
)
from pfcr_mm.reconstruction.pos import Stage
from pfcr_mm.reconstruction.units import Unit


def unit(start, stop):
    return Unit('u', 'backbone', 'leaf', 'L', start, stop)


@pytest.mark.parametrize('schedule, expected', [
    # leaf 0 alone: two inputs of 10, an output of 20 and a side of 1
    ([unit(0, 1)], 10 + 10 + 20 + 1),
    # leaf 1 holds boundaries 0 and 1 of both streams, and its output of 5
    ([unit(0, 1), unit(1, 2)], 10 + 10 + 20 + 20 + 5),
    # all at once: inputs, the last output, both sides
    ([unit(0, 2)], 10 + 10 + 5 + 1),
], ids=['first', 'both', 'whole'])
def test_by_hand(schedule, expected):
    assert memory.peak_elements(schedule, sizes=[10, 20, 5], sides=[1, 0]) == expected


def test_an_output_that_is_made_anew_for_its_sides():
    schedule = [unit(0, 1), unit(0, 1), unit(1, 2)]
    peak = memory.peak_elements(schedule, sizes=[10, 20, 0], sides=[3, 0])
    assert peak == 10 + 10 + 20 + 20 + 3


@pytest.mark.parametrize('levels', [['leaf'], ['leaf', 'block', 'pair', 'stage', 'backbone'],
                                    ['block', 'stage']], ids='-'.join)
@pytest.mark.parametrize('traversal', ['post_order', 'level_order'])
def test_against_the_reconstructor(levels, traversal):
    model, teacher, inputs = toy(images=8)
    chain = chain_of(model)
    schedule = build_schedule(chain, levels, traversal)
    reconstructor = ChainReconstructor(
        chain, chain_of(teacher), stream(inputs), stream(inputs), torch.device('cpu'), 2, 0)
    sizes, sides = memory.boundary_sizes(chain, State((torch.cat(inputs, 1), )))
    held, current = [], []

    def measure(targets):
        held.append(targets + sum(
            t.numel() for kept in (reconstructor.quantized, reconstructor.floating)
            for s in kept.streams.values() for state in s.states for t in state.tensors))

    def at_step(*_):  # beside the boundaries, the unit's own float outputs
        unit, = current
        end = sizes[unit.stop] if unit.stop == len(chain.leaves) else 0  # else a boundary too
        measure(end + sum(sides[unit.start:unit.stop]))

    put = reconstructor.quantized.put
    reconstructor.quantized.put = lambda *args: (put(*args), measure(0))
    reconstructor.run(
        schedule, lambda level: UnitConfig(iters=1, batch_size=2), Stage(1, True, True, ()),
        on_unit_start=lambda unit: current.__setitem__(slice(None), [unit]), on_step=at_step)
    assert memory.peak_elements(schedule, sizes, sides) == max(held)


def test_scales_with_area_and_rois(quantized):
    chains, _ = part_chains(quantized)
    schedules = {part: build_schedule(chain, ['leaf', 'chain']) for part, chain in chains.items()}
    rois = dict(proposals=6, detections=2)

    def count(pixels, images):
        return memory.stream_elements(quantized, chains, schedules, pixels, images, rois)

    one, two = count(100 * 100, 1), count(2 * 100 * 100, 2)
    assert set(one) == set(chains)
    for part in chains:
        assert two[part] == pytest.approx(2 * one[part], rel=1e-3) and one[part] > 0
    bigger, box_head, mask_head = count(2 * 100 * 100, 1), *[f'roi_head.{k}_head' for k in (
        'bbox', 'mask')]
    assert bigger['neck'] == two['neck'] and bigger[box_head] == one[box_head]
    # features for the mask head wait while the heads before it are reconstructed
    sizes = {part: sum(t.numel() for t in part_streams.sample_state(
        quantized, part, torch.zeros(1, 3, 64, 64), rois).tensors) for part in chains}
    alone = {part: memory.stream_elements(
        quantized, chains, {**schedules, mask_head: []}, 100 * 100, 1, rois)[part]
        for part in ('rpn_head', box_head)}
    for part, count_alone in alone.items():
        assert one[part] - count_alone == 2 * sizes[mask_head]


def test_shapes_are_the_streams(quantized, images):
    """The sample that stands in for images has the shapes of the real streams."""
    inputs = torch.zeros_like(images[0][0])
    rois = dict(proposals=3, detections=2)
    boxes = torch.tensor([[0., 0, 30, 30], [5, 5, 20, 20], [1, 1, 9, 9]])
    heads = {'rpn_head': None, 'roi_head.bbox_head': boxes, 'roi_head.mask_head': boxes[:2]}
    one = images_of(images[:1])
    real, _ = part_streams.head_streams(quantized, one, list(heads), lambda *_: heads)
    real['neck'] = part_streams.backbone_stream(quantized, one)
    assert set(real) == set(part_chains(quantized)[0]) - {'backbone'}
    for part, found in real.items():
        sample = part_streams.sample_state(quantized, part, inputs, rois)
        assert [t.shape for t in sample.tensors] == [t.shape for t in found.states[0].tensors]


def test_targets_of_the_whole_detector(quantized):
    """Predictions of the RPN grow with the area, those of RoIs with their number."""
    chain = whole_chain(quantized, part_chains(quantized)[0])
    schedules, rois = {WHOLE: build_schedule(chain, [WHOLE])}, dict(proposals=6, detections=2)

    def count(areas, images):
        return memory.stream_elements(
            quantized, {WHOLE: chain}, schedules, areas * memory.SIDE**2, images, rois)[WHOLE]

    image = torch.zeros(1, 3, memory.SIDE, memory.SIDE)
    outputs = chain.run(part_streams.sample_state(quantized, WHOLE, image, rois))[0].tensors
    sizes = {kind: 0 for kind in chain.kinds}
    for kind, x in zip(chain.kinds, outputs):
        sizes[kind] += x.numel()
    dense = sizes['dense_scores'] + sizes['dense_deltas']
    assert count(1, 1) == sum(sizes.values())
    assert count(3, 5) == 3 * dense + 5 * (sum(sizes.values()) - dense)
