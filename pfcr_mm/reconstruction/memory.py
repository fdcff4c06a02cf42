"""How much memory the streams of a reconstruction take, before any is made.

Sizes are counted on one small image and scaled by area: what flows between leaves
grows with the image, features of RoIs grow with their number.
"""
import torch

from ..models.whole import DENSE_DELTAS, DENSE_SCORES, WHOLE
from .part_streams import sample_state

SIDE = 256  # of the small image, where the model takes any; all common strides divide it


@torch.no_grad()
def stream_elements(model, chains, schedules, pixels, images, rois):
    """Numbers that the streams of each part hold at their peak.

    Args:
        model (nn.Module): detector, quantizers off.
        chains (dict[str, Chain]): by part.
        schedules (dict[str, list[Unit]]): by part.
        pixels (int): of all calibration images together.
        images (int): number of calibration images.
        rois (dict): RoIs an image for box heads (`proposals`) and mask heads (`detections`).

    Returns:
        dict[str, int]: by part; 0 where nothing is reconstructed. The images themselves
        are left out.
    """
    height, width = getattr(model, 'input_size', (SIDE, SIDE))
    image = next(model.parameters()).new_zeros(1, 3, height, width)
    found, inputs = {}, {}
    for part, schedule in schedules.items():
        if not schedule:
            found[part] = 0
            continue
        state = sample_state(model, part, image, rois)
        if part == WHOLE:
            found[part] = _predictions(chains[part], state, pixels / (height * width), images)
            continue
        sizes, sides = boundary_sizes(chains[part], state)
        if part == 'backbone':
            sizes[0] = 0  # the images are there anyhow
        scale = images if part.startswith('roi_head.') else pixels / (height * width)
        found[part] = round(peak_elements(schedule, sizes, sides) * scale)
        if part.startswith('roi_head.'):
            inputs[part] = 2 * sizes[0] * images
    waiting = 0  # streams into RoI heads are made for all of them together with the first head's
    for part in reversed(found):
        if part not in ('backbone', 'neck') and found[part]:
            found[part], waiting = found[part] + waiting, waiting + inputs.get(part, 0)
    return found


def _predictions(chain, state, areas, images):
    """Elements of all targets of the whole detector; the RPN's grow with the images."""
    outputs = chain.run(state)[0].tensors
    return round(sum(
        x.numel() * (areas if kind in (DENSE_SCORES, DENSE_DELTAS) else images)
        for kind, x in zip(chain.kinds, outputs)))


def boundary_sizes(chain, state):
    """Elements before, between and after the leaves, and each leaf's side outputs.

    Returns:
        tuple[list[int], list[int]]: leaves + 1 and leaves long.
    """
    sizes, sides = [_elements(state.tensors)], []
    for number in range(len(chain.leaves)):
        state, side = chain.run(state, number, number + 1)
        sizes.append(_elements(state.tensors))
        sides.append(_elements(side))
    return sizes, sides


def peak_elements(schedule, sizes, sides):
    """The most that `ChainReconstructor` holds at once while it walks a schedule.

    Both streams are kept at boundaries where a later unit starts, the float one also where one
    ends. The unit in work adds its float outputs, which are such a boundary except at the
    chain's end. What a loss wants to see beside the unit's own outputs is left out.

    Args:
        schedule (list[Unit]): units in order.
        sizes, sides (list[int]): see `boundary_sizes`.
    """
    quantized, floating, peak = {0}, {0}, 0

    def held():
        return sum(sizes[b] for streams in (quantized, floating) for b in streams)

    for number, unit in enumerate(schedule, 1):
        upcoming = schedule[number:]
        quantized.add(unit.start)
        floating.add(unit.start)
        own = sum(sides[unit.start:unit.stop])
        if unit.stop == len(sides) or (own and unit.stop in floating):  # computed (anew)
            own += sizes[unit.stop]
        else:
            floating.add(unit.stop)
        peak = max(peak, held() + own)
        quantized = {b for b in quantized if b <= unit.start}
        if upcoming and upcoming[0].start >= unit.stop:
            quantized.add(upcoming[0].start)
            floating.add(upcoming[0].start)
            peak = max(peak, held())
        needed = {later.start for later in upcoming} | {0}
        quantized &= needed
        floating &= needed | {later.stop for later in upcoming}
    return peak


def _elements(tensors):
    return sum(t.numel() for t in tensors)
