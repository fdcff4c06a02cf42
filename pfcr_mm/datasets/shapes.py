"""Draws a COCO-format instance segmentation data set of textured shapes.

Every image is a function of (seed, split, index) alone. Objects are annotated by
their *visible* region: polygons where it has no hole, RLE where it has one, and
an uncompressed RLE with `iscrowd=1` for swarms of small shapes.
"""
import fcntl
import json
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

CLASSES = ('disc', 'box', 'triangle', 'star', 'ring', 'cross')
VERSION = 2  # raise when a drawing changes, so that old data is drawn anew
_SUBPIXEL = 4  # bits of subpixel precision for cv2 polygons
_MIN_VISIBLE = 0.35  # an object hidden more than this is not drawn


@dataclass(frozen=True)
class Scene:
    """What the scenes of a data set are like; sizes are shares of the image.

    Args:
        radius (tuple[float]): smallest and largest object radius, drawn log-uniformly.
        margin (float): how near to the border (or beyond) centres may come.
        contrast (float): least mean difference of an object from what it covers, 0 to 255.
        max_objects (int): most objects an image tries to hold.
    """

    radius: tuple = (0.075, 0.5)
    margin: float = 0.12
    contrast: float = 40.0
    max_objects: int = 5


SCENES = dict(
    normal=Scene(), hard=Scene(radius=(0.055, 0.5), margin=0.06, contrast=25.0, max_objects=6))


def write_shapes(root, split, num_images, seed=0, image_size=128, scene='normal'):
    """Write `root/split/*.png` and `root/annotations/instances_{split}.json`.

    Does nothing where the same data is there already. The annotation file is
    renamed into place last, so an interrupted call never looks complete.

    Args:
        root (str | Path): data root, created when missing.
        split (str): name of the split; each split has its own images.
        num_images (int): how many images.
        seed (int): seed of the whole data set.
        image_size (int): height and width in pixels.
        scene (str): a name of SCENES.

    Returns:
        Path: the annotation file.
    """
    root = Path(root)
    ann_file = root / 'annotations' / f'instances_{split}.json'
    info = dict(
        description='pfcr_mm generated shapes', version=VERSION, split=split,
        num_images=num_images, seed=seed, image_size=image_size, scene=scene)
    if _info_of(ann_file) == info:
        return ann_file

    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):  # of several processes one draws, the others find it done
        if _info_of(ann_file) != info:
            _write(root, ann_file, info)
    return ann_file


def _write(root, ann_file, info):
    split, num_images, seed, image_size, scene = (
        info[key] for key in ('split', 'num_images', 'seed', 'image_size', 'scene'))
    staging = Path(tempfile.mkdtemp(prefix=f'.{split}-', dir=root))
    images, annotations = [], []
    for index in range(num_images):
        image, objects = draw_image(seed, split, index, image_size, scene)
        file_name = f'{index:06d}.png'
        cv2.imwrite(str(staging / file_name), image)
        images.append(dict(id=index + 1, file_name=file_name, height=image_size, width=image_size))
        for obj in objects:
            annotations.append(dict(obj, id=len(annotations) + 1, image_id=index + 1))
    if ann_file.exists():
        ann_file.unlink()
    target = root / split
    if target.exists():
        shutil.rmtree(target)
    os.chmod(staging, 0o755)
    os.replace(staging, target)

    ann_file.parent.mkdir(exist_ok=True)
    partial = ann_file.with_suffix('.json.tmp')
    partial.write_text(json.dumps(dict(
        info=info, images=images, annotations=annotations,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)])))
    os.replace(partial, ann_file)


@contextmanager
def _locked(folder):
    """Hold the kernel's lock on a folder; it goes with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def draw_image(seed, split, index, size=128, scene='normal'):
    """Draw one image.

    Returns:
        tuple: BGR image, uint8 (size, size, 3), and its COCO annotations
        (without `id` and `image_id`).
    """
    scene = SCENES[scene]
    rng = np.random.default_rng([seed, *split.encode(), index])
    image = _background(rng, size)
    _clutter(rng, image)

    regions = []  # (class index, mask, iscrowd), drawn back to front
    if rng.random() < 0.08:
        regions.append(_swarm(rng, image))
    for _ in range(rng.integers(1, scene.max_objects + 1)):
        _try_object(rng, image, regions, scene)
    if rng.random() < 0.5:
        _sensor(rng, image)
    annotations = [_annotation(label, mask, crowd) for label, mask, crowd in regions]
    return image.clip(0, 255).astype(np.uint8), annotations


def _info_of(ann_file):
    try:
        return json.loads(ann_file.read_text())['info']
    except (OSError, ValueError, KeyError):
        return None


# --- pixels -----------------------------------------------------------------

def _noise(rng, size, cell):
    """Smooth noise in [0, 1], shape (size, size, 1); `cell` is its grain in pixels."""
    coarse = rng.random((size // cell + 2, size // cell + 2)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)[..., None]


def _background(rng, size):
    low, high = rng.uniform(20, 235, (2, 3))
    image = low + (high - low) * _noise(rng, size, int(rng.integers(16, 64)))
    image = image + rng.uniform(10, 60) * (_noise(rng, size, int(rng.integers(3, 9))) - 0.5)
    return image.astype(np.float32)


def _clutter(rng, image):
    """Lines, arcs and specks that belong to no class."""
    size = image.shape[0]
    for _ in range(rng.integers(0, 9)):
        color = rng.uniform(0, 255, 3).tolist()
        start, end = rng.integers(0, size, (2, 2)).tolist()
        kind = rng.integers(3)
        if kind == 0:
            cv2.line(image, start, end, color, int(rng.integers(1, 4)), cv2.LINE_AA)
        elif kind == 1:
            axes = rng.integers(4, size // 2, 2).tolist()
            angles = sorted(rng.uniform(0, 360, 2).tolist())
            cv2.ellipse(image, start, axes, 0, angles[0], min(angles[1], angles[0] + 150),
                        color, int(rng.integers(1, 3)), cv2.LINE_AA)
        else:
            for x, y in rng.integers(0, size, (12, 2)).tolist():
                cv2.circle(image, (x, y), 1, color, -1, cv2.LINE_AA)


def _texture(rng, size):
    """A paint of shape (size, size, 3): plain, shaded, striped, chequered or grained."""
    first, second = rng.uniform(0, 255, (2, 3))
    kind = rng.integers(5)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    if kind == 0:
        blend = np.zeros((size, size, 1), np.float32)
    elif kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        blend = (((x * np.cos(angle) + y * np.sin(angle)) / size) % 1)[..., None]
    elif kind == 2:
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 12)
        phase = (x * np.cos(angle) + y * np.sin(angle)) / period
        blend = (0.5 + 0.5 * np.sign(np.sin(2 * np.pi * phase)))[..., None]
    elif kind == 3:
        period = rng.uniform(4, 10)
        blend = ((np.floor(x / period) + np.floor(y / period)) % 2)[..., None]
    else:
        blend = _noise(rng, size, int(rng.integers(2, 6)))
    return (first + (second - first) * blend).astype(np.float32)


def _sensor(rng, image):
    """Camera-like blur and noise, in place."""
    if rng.random() < 0.5:
        cv2.GaussianBlur(image, (3, 3), rng.uniform(0.3, 0.9), dst=image)
    image += rng.normal(0, rng.uniform(1, 10), image.shape).astype(np.float32)


# --- shapes -----------------------------------------------------------------

def _outline(name, rng):
    """Polygon(s) of a shape in the unit square, centred on 0: outer, then holes."""
    aspect = rng.uniform(0.7, 1.0)
    circle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ellipse = np.stack([np.cos(circle), aspect * np.sin(circle)], 1)
    if name == 'disc':
        return [ellipse]
    if name == 'ring':
        return [ellipse, ellipse * rng.uniform(0.45, 0.65)]
    if name == 'box':
        return [np.array([[-1, -aspect], [1, -aspect], [1, aspect], [-1, aspect]]) * 0.85]
    if name == 'triangle':
        angles = np.deg2rad([90, 210, 330] + rng.uniform(-12, 12, 3))
        return [np.stack([np.cos(angles), np.sin(angles)], 1)]
    if name == 'star':
        points = int(rng.integers(5, 7))
        angles = np.arange(2 * points) * np.pi / points
        radii = np.where(np.arange(2 * points) % 2, rng.uniform(0.4, 0.5), 1.0)
        return [np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]]
    arm = rng.uniform(0.25, 0.38)  # cross
    quarter = np.array([[arm, 1], [arm, arm], [1, arm]])
    turn = np.array([[0, -1], [1, 0]])
    corners = [quarter[::-1] @ np.linalg.matrix_power(turn, -k) for k in range(4)]
    return [np.concatenate(corners)]


def _rasterise(rng, label, centre, radius, size):
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    polygons = [
        np.round((points @ turn.T * radius + centre) * 2**_SUBPIXEL).astype(np.int32)
        for points in _outline(CLASSES[label], rng)
    ]
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, polygons, 1, shift=_SUBPIXEL)  # even-odd: holes stay open
    return mask


def _paint(image, mask, texture):
    alpha = cv2.GaussianBlur(mask.astype(np.float32), (3, 3), 0.6)[..., None]
    image[:] = image * (1 - alpha) + texture * alpha


def _try_object(rng, image, regions, scene):
    """Draw one object, unless it would hide another (or itself) too much."""
    size = image.shape[0]
    label = int(rng.integers(len(CLASSES)))
    radius = size * np.exp(rng.uniform(*np.log(scene.radius)))
    centre = rng.uniform(scene.margin * size, (1 - scene.margin) * size, 2)
    mask = _rasterise(rng, label, centre, radius, size)
    texture = _texture(rng, size)
    full = max(1, int(np.pi * radius**2 * 0.3))
    contrast = np.abs((texture - image)[mask > 0]).mean() if mask.any() else 0
    if mask.sum() < max(24, _MIN_VISIBLE * full) or contrast < scene.contrast:
        return
    for _, other, crowd in regions:
        if not crowd and (other & ~mask & 1).sum() < 0.6 * other.sum():
            return
    _paint(image, mask, texture)
    for i, (kind, other, crowd) in enumerate(regions):
        regions[i] = (kind, other & (1 - mask), crowd)
    regions.append((label, mask, 0))
    regions[:] = [r for r in regions if r[1].sum() >= 24]


def _swarm(rng, image):
    """A crowd region: many small shapes of one class."""
    size = image.shape[0]
    label = int(rng.integers(len(CLASSES)))
    union = np.zeros((size, size), np.uint8)
    centre = rng.uniform(0.2 * size, 0.8 * size, 2)
    for _ in range(rng.integers(10, 18)):
        spot = centre + rng.normal(0, 0.09 * size, 2)
        mask = _rasterise(rng, label, spot, rng.uniform(3, 5), size)
        _paint(image, mask, _texture(rng, size))
        union |= mask
    return label, union, 1


# --- annotations ------------------------------------------------------------

def _annotation(label, mask, crowd):
    rle = coco_mask.encode(np.asfortranarray(mask))
    if crowd:
        segmentation = dict(size=list(mask.shape), counts=_run_lengths(mask))
    else:
        segmentation = _polygons(mask) or dict(
            size=list(rle['size']), counts=rle['counts'].decode('ascii'))
    return dict(
        category_id=label + 1, iscrowd=crowd, area=float(coco_mask.area(rle)),
        bbox=[float(v) for v in coco_mask.toBbox(rle)], segmentation=segmentation)


def _polygons(mask):
    """Outlines of a mask without holes, or None where polygons cannot tell it."""
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if hierarchy is None or (hierarchy[0, :, 3] >= 0).any():
        return None
    polygons = [c.reshape(-1).astype(float).tolist() for c in contours if len(c) >= 3]
    if not polygons:
        return None
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape)))
    overlap = (drawn & mask).sum() / max(1, (drawn | mask).sum())
    return polygons if overlap > 0.8 else None


def _run_lengths(mask):
    """Uncompressed COCO RLE: column-major run lengths that start with zeros."""
    flat = mask.flatten(order='F')
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs
