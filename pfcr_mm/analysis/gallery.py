"""Images with the detections of the float and the quantized model side by side."""
import mmcv
import numpy as np
import torch

from .style import figure, title

SHOWN = 6
_COLOURS = ('#E69F00', '#56B4E9', '#009E73', '#F0E442', '#0072B2', '#D55E00', '#CC79A7')


def gallery(pairs, classes):
    """One figure an image, the worst disagreements first.

    Args:
        pairs (list[Pair]): sorted, see `compare`.
        classes (list[str]): names.

    Returns:
        tuple[list, list[str]]: (pair, figure) of images that can be read; the others' paths.
    """
    shown, gone = [], []
    for pair in pairs:
        if len(shown) == SHOWN:
            break
        try:
            image = mmcv.imread(pair.path, channel_order='rgb')
        except (OSError, FileNotFoundError):
            image = None
        if image is None:
            gone.append(pair.path)
            continue
        shown.append((pair, _side_by_side(image, pair, classes)))
    return shown, gone


def _side_by_side(image, pair, classes):
    height, width = image.shape[:2]
    made, (axes, ) = figure(0.5 + 4.3 * min(1.6, height / width), 1, 2)
    facts = pair.facts
    for axis, label, found in ((axes[0], 'float', pair.floating),
                               (axes[1], 'quantized', pair.quantized)):
        axis.imshow(_with_masks(image, found))
        _boxes(axis, found, classes, width)
        axis.set_title(f'{label}: {len(found.labels)} detections', fontsize=9)
        axis.set_axis_off()
    title(made, f"{pair.image}: {facts['matched']} matched, {facts['only_float']} only float, "
          f"{facts['only_quantized']} only quantized; disagreement {facts['disagreement']:.2f}")
    return made


def _with_masks(image, found):
    image = image.astype(np.float32)
    if 'masks' not in found:
        return image.astype(np.uint8)
    for mask, label in zip(found.masks, found.labels.tolist()):
        mask = (mask.numpy() if torch.is_tensor(mask) else np.asarray(mask)).astype(bool)
        if mask.shape == image.shape[:2]:
            image[mask] = 0.55 * image[mask] + 0.45 * _rgb(label)
    return image.astype(np.uint8)


def _boxes(axis, found, classes, width):
    for box, label, score in zip(found.bboxes.tolist(), found.labels.tolist(),
                                 found.scores.tolist()):
        x, y, right, bottom = box
        colour = _COLOURS[label % len(_COLOURS)]
        axis.plot([x, right, right, x, x], [y, y, bottom, bottom, y], color='black', lw=2.4)
        axis.plot([x, right, right, x, x], [y, y, bottom, bottom, y], color=colour, lw=1.2)
        name = classes[label] if label < len(classes) else str(label)
        axis.text(min(x, 0.8 * width), max(y, 2), f'{name} {score:.2f}', fontsize=6.5,
                  color='black', va='bottom', clip_on=True,
                  bbox=dict(facecolor=colour, alpha=0.85, pad=0.6, lw=0))


def _rgb(label):
    colour = _COLOURS[label % len(_COLOURS)].lstrip('#')
    return np.array([int(colour[i:i + 2], 16) for i in (0, 2, 4)], np.float32)
