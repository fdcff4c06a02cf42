"""Helpers for tests on tiny detectors."""
import copy

import torch

from pfcr_mm.models import State
from pfcr_mm.models.head_folds import fold_heads
from pfcr_mm.modules import set_quantization
from pfcr_mm.reconstruction import AttendedValues, calibrate, observe
from pfcr_mm.reconstruction.cache import FeatureCache
from pfcr_mm.reconstruction.capture import Images


@torch.no_grad()
def randomise(model, seed=0):
    """Seeded weights in which every bias, norm and position bias matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if '_quantizer.' in name:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2 and 'bias_table' not in name:
            parameter.copy_(noise / parameter[0].numel()**0.5)
        elif 'norm' in name and name.endswith('weight'):
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(0.2 * noise)
    return model


def predict(detector, inputs, samples):
    """Detections of one image."""
    with torch.no_grad():
        return detector.predict(inputs, copy.deepcopy(samples), rescale=False)[0].pred_instances


def images_of(pairs, numbers=None):
    """(inputs, data samples) pairs as calibration images; without `numbers` they are all."""
    shelf = FeatureCache().shelf()
    return Images([shelf.keep(State((inputs, ))) for inputs, _ in pairs],
                  [samples for _, samples in pairs],
                  list(range(len(pairs))) if numbers is None else numbers)


def calibrated(detector, images, method='mse', on=True):
    """Calibrate from float passes over `images`, and switch the quantizers on."""
    with observe(detector, 256) as seen:
        for inputs, samples in images:
            predict(detector, inputs, samples)
    calibrate(detector, seen, method)
    set_quantization(detector, on, on)
    return detector


def fold_by(model, run):
    """Fold the heads of a model by what its layers are given while `run()` runs."""
    with observe(model, 4096) as seen, AttendedValues(model) as attended:
        run()
    return fold_heads(model, {name: r.rows for name, r in seen.layers.items()}, attended.means)
