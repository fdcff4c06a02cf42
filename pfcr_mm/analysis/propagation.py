"""Error propagation: SQNR at every boundary of every chain, input to output."""
import torch

from ..models import State, part_chains
from ..models.roi_features import crops
from ..reconstruction import roi
from .noise import Noise
from .probe import on_device

_BOXES = dict(proposals=32, detections=8)


@torch.no_grad()
def propagation(floating, quantized, images, boxes=None):
    """SQNR behind every leaf, each model fed with what it computed itself.

    RoI features are cut at the same boxes, those of the float model, so that they line up.

    Args:
        floating (nn.Module): float twin, folded alike (see `align`).
        quantized (nn.Module): quantizers on.
        images (list): (inputs, data samples) pairs.
        boxes (dict | None): see `common_boxes`.

    Returns:
        list[dict]: part, name, kind ('leaf'; 'map', what a backbone hands to the neck;
        'output', one tensor of a part's last leaf), block, letter, sqnr_db; in order.
    """
    models = (floating, quantized)
    chains = [part_chains(model)[0] for model in models]
    found = {}
    for index, (inputs, _) in enumerate(images):
        starts = [part_inputs(model, list(chains[0]), inputs, boxes, index) for model in models]
        for part, chain in chains[0].items():
            if part not in starts[0]:
                continue
            pair = [(chains[i][part], starts[i][part]) for i in (0, 1)]
            for key, facts, reference, value in _walk(part, chain, pair):
                found.setdefault(key, (facts, Noise()))[1].add(reference, value)
    return [dict(facts, sqnr_db=noise.db) for facts, noise in found.values()]


def _walk(part, chain, pair):
    """Yield (key, facts, float tensor, quantized tensor) leaf by leaf."""
    states = [state for _, state in pair]
    maps = 0
    for number, leaf in enumerate(chain.leaves):
        results = [other.leaves[number].forward(state)
                   for (other, _), state in zip(pair, states)]
        states = [state for state, _ in results]
        tensors = list(zip(*(state.tensors for state in states)))
        facts = dict(part=part, block=leaf.block, letter=leaf.letter)
        for reference, value in tensors:
            yield (part, leaf.name), dict(facts, name=leaf.name, kind='leaf'), reference, value
        for reference, value in zip(*(side for _, side in results)):
            name = f'map {maps}'
            yield (part, name), dict(facts, name=name, kind='map'), reference, value
            maps += 1
        if number == len(chain.leaves) - 1 and len(tensors) > 1:
            for i, (reference, value) in enumerate(tensors):
                name = f'{leaf.name}[{i}]'
                yield (part, name), dict(facts, name=name, kind='output'), reference, value


@torch.no_grad()
def common_boxes(floating, images):
    """Boxes of the float model for each RoI head and image, or None without RoI heads."""
    if not any(part.startswith('roi_head.') for part in part_chains(floating)[0]):
        return None
    found = [roi.boxes_of(floating, floating.extract_feat(on_device(floating, inputs)), samples,
                          number, seed=0, **_BOXES)
             for number, (inputs, samples) in enumerate(images)]
    return {part: [boxes[part] for boxes in found] for part in found[0]} if found else {}


@torch.no_grad()
def part_inputs(model, parts, inputs, boxes, index):
    """What flows into each part of a model for one image.

    Args:
        model (nn.Module): a detector or a classifier.
        parts (list[str]): names of parts that have chains.
        inputs (Tensor): (1, 3, H, W).
        boxes (dict | None): see `common_boxes`.
        index (int): number of the image, in `boxes`.

    Returns:
        dict[str, State]: by part; RoI heads without a box are left out.
    """
    inputs = on_device(model, inputs)
    states = {'backbone': State((inputs, ))}
    if list(parts) == ['backbone']:
        return states
    maps = tuple(model.backbone(inputs))
    states['neck'] = State(maps)
    if getattr(model, 'with_neck', False):
        maps = tuple(model.neck(maps))
    for part in parts:
        if part in states:
            continue
        if not part.startswith('roi_head.'):
            states[part] = State(maps)
        elif len(boxes[part][index]) > 0:
            states[part] = State((crops(model, part, maps, [boxes[part][index]]), ))
    return {part: states[part] for part in parts if part in states}
