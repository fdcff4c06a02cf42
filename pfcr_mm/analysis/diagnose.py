"""All that a report says beyond the run's own records: numbers, and material for figures."""
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..engine.resume import random_state, set_random_state
from ..modules import quantizers_of
from .activations import activations
from .attention import attention
from .layers import layers
from .predictions import compare, predict
from .probe import name_of, probe_images
from .propagation import common_boxes, propagation
from .taps import Taps, grid
from .twins import align

SIGNAL_IMAGES = 6  # for statistics of signals
GALLERY_IMAGES = 24  # of which the worst are shown


@dataclass
class Material:
    """What figures draw and no JSON holds."""

    samples: dict = field(default_factory=dict)  # quantizer name -> (float, quantized) values
    grids: dict = field(default_factory=dict)  # quantizer name -> levels (groups, levels)
    pairs: list = field(default_factory=list)  # predictions, worst first
    classes: list = field(default_factory=list)


@contextmanager
def untouched(*models):
    """Leaves random numbers and the models' modes and quantizers as they were."""
    state = random_state()
    models = [model for model in models if model is not None]
    before = [([(m, m.training) for m in model.modules()],
               [(q, q.enabled) for _, q in quantizers_of(model)]) for model in models]
    try:
        yield
    finally:
        set_random_state(state)
        for modes, switches in before:
            for module, training in modes:
                module.training = training
            for quantizer, enabled in switches:
                quantizer.enabled = enabled


@torch.no_grad()
def diagnose(cfg, quantized, floating, calibrated=None, notes=()):
    """Compare a quantized model with its float twin on images of the test split.

    Args:
        cfg (Config): with `test_dataloader`.
        quantized (nn.Module): hardened, quantizers on; left as it was.
        floating (nn.Module | None): its float twin, which is folded alike; without it only
            the layers' facts are there.
        calibrated (nn.Module | None): the model as it was before reconstruction.
        notes (list[str]): what is missing, and why.

    Returns:
        tuple[dict, Material]: plain data (`diagnostics` of report.json); what figures need.
    """
    began = time.time()
    notes = list(notes)
    with untouched(quantized, floating, calibrated):
        random.seed(0)  # pipelines may draw
        images, meta, missing = probe_images(cfg, quantized, GALLERY_IMAGES)
    notes += missing[:3]
    if len(missing) > 3:
        notes.append(f'{len(missing) - 3} more images are missing')
    if not images:
        notes.append('no image could be read: what needs images is left out')
    found, material = compare_models(images, quantized, floating, calibrated)
    material.classes = list(meta.get('classes') or [])
    return dict(found, split='test', notes=notes, seconds=time.time() - began), material


@torch.no_grad()
def compare_models(images, quantized, floating, calibrated=None):
    """What the models do on given images; all of them are left as they were.

    Args:
        images (list): (inputs, data samples) pairs.
        quantized, floating, calibrated: see `diagnose`.

    Returns:
        tuple[dict, Material]
    """
    few, material = images[:SIGNAL_IMAGES], Material()
    found = dict(images=[name_of(samples) for _, samples in few], compared_images=len(images))
    if floating is None or not images:
        return found, material
    with untouched(quantized, floating, calibrated):
        boxes = common_boxes(floating, few)
        found['propagation'] = _propagations(floating, quantized, calibrated, few, boxes)
        align(floating, quantized)
        with Taps(floating) as floating_taps:
            floats = predict(floating, few)
        with Taps(quantized, floating) as taps:
            ours = predict(quantized, few)
        floats += predict(floating, images[SIGNAL_IMAGES:])
        ours += predict(quantized, images[SIGNAL_IMAGES:])
        found['layers'] = layers(quantized, floating, taps.local)
        found['activations'] = activations(quantized, floating_taps, taps)
        found['attention'] = attention(floating_taps, taps)
        material.pairs, found['agreement'] = compare(images, floats, ours)
        found['disagreements'] = [dict(image=pair.image, **pair.facts) for pair in material.pairs]
        by_name = dict(quantized.named_modules())
        for entry in found['activations']:
            name = entry['name']
            material.samples[name] = (
                floating_taps.seen[name].values(), taps.seen[name].values())
            material.grids[name] = grid(by_name[name])
    return found, material


def _propagations(floating, quantized, calibrated, images, boxes):
    """SQNR of both quantized models, point by point: `calibrated` and `quantized` in dB."""
    align(floating, quantized)
    points = propagation(floating, quantized, images, boxes)
    before = {}
    if calibrated is not None:
        align(floating, calibrated)
        before = {(p['part'], p['name']): p['sqnr_db']
                  for p in propagation(floating, calibrated, images, boxes)}
    return [dict({k: v for k, v in point.items() if k != 'sqnr_db'},
                 calibrated=before.get((point['part'], point['name'])),
                 quantized=point['sqnr_db']) for point in points]
