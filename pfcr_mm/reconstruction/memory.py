"""How much memory the streams of a reconstruction take, before any is made.

Sizes are counted on one small image and scaled by area: what flows between leaves
grows with the image, features of RoIs grow with their number.
"""
import torch

from . import roi

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
    found = {}
    for part, schedule in schedules.items():
        if not schedule:
            found[part] = 0
            continue
        sizes, sides = boundary_sizes(chains[part], roi.sample_state(model, part, image, rois))
        if part == 'backbone':
            sizes[0] = 0  # the images are there anyhow
        scale = images if part.startswith('roi_head.') else pixels / (height * width)
        found[part] = round(peak_elements(schedule, sizes, sides) * scale)
    return found


def boundary_sizes(chain, state):
    """Elements before, between and after the leaves, and each leaf's side outputs.

    Returns:
        tuple[list[int], list[int]]: leaves + 1 and leaves long.
    """
    sizes, sides = [_elements(state.tensors)], []
    for leaf in chain.leaves:
        state, side = leaf.forward(state)
        sizes.append(_elements(state.tensors))
        sides.append(_elements(side))
    return sizes, sides


def peak_elements(schedule, sizes, sides):
    """The most that `ChainReconstructor` holds at once while it walks a schedule.

    Both streams are kept at boundaries where a later unit starts; the unit in work
    adds its float outputs, side outputs included.

    Args:
        schedule (list[Unit]): units in order.
        sizes, sides (list[int]): see `boundary_sizes`.
    """
    quantized, floating, peak = {0}, {0}, 0
    for number, unit in enumerate(schedule):
        quantized.add(unit.start)
        floating.add(unit.start)
        held = sum(sizes[b] for streams in (quantized, floating) for b in streams)
        targets = sum(sides[unit.start:unit.stop])
        peak = max(peak, held + targets + sizes[unit.stop])
        quantized = {b for b in quantized if b <= unit.start}
        if unit.stop < len(sides):
            quantized.add(unit.stop)
            floating.add(unit.stop)
            held = sum(sizes[b] for streams in (quantized, floating) for b in streams)
            peak = max(peak, held + targets)
        needed = {later.start for later in schedule[number + 1:]} | {0}
        quantized, floating = quantized & needed, floating & needed
    return peak


def _elements(tensors):
    return sum(t.numel() for t in tensors)
