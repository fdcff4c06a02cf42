"""Calibration images."""
from types import SimpleNamespace

import torch
from demo_runs import W4A4, data_options, options_as_dict
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from pfcr_mm.engine.data import calibration_images
from pfcr_mm.reconstruction.cache import FeatureCache


def test_images_are_kept_in_the_cache_without_ground_truth(tmp_path):
    cfg = Config.fromfile(W4A4)
    cfg.merge_from_dict(options_as_dict(data_options(tmp_path, images=4, val_images=2)))
    init_default_scope('mmdet')
    model = SimpleNamespace(data_preprocessor=MODELS.build(cfg.model.data_preprocessor))
    found = []
    for memory_mb in (None, 0):
        store = FeatureCache(torch.float16, memory_mb, tmp_path)
        images = calibration_images(cfg, model, 3, 0, cache=store)
        assert images.numbers == [0, 1, 2] == list(range(len(images)))
        assert store.held == (0 if memory_mb == 0 else 3 * 3 * 128 * 128 * 4)
        assert images.stream().states == list(images.states)
        for inputs, (sample, ) in images:
            assert inputs.shape == (1, 3, 128, 128) and inputs.dtype == torch.float32
            assert sample.keys() == [] and sample.metainfo['img_path']
        found.append(torch.cat([inputs for inputs, _ in images]))
    assert torch.equal(*found)
