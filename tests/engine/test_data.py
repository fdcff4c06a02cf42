"""Calibration images."""
from types import SimpleNamespace

import pytest
import torch
from demo_runs import W4A4, data_options, options_as_dict
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from pfcr_mm.engine.data import (
    calibration_dataset_cfg,
    calibration_images,
    refuse_shared_images,
)
from pfcr_mm.engine.planned import Planned
from pfcr_mm.errors import UsageError
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


class Paths(list):
    """A dataset that is its images' paths."""

    def get_data_info(self, index):
        return dict(img_path=self[index])


@pytest.mark.parametrize('path', ['val/1.jpg', './val/1.jpg', '{here}/val/1.jpg', 'link/1.jpg'])
def test_an_image_is_the_same_whatever_way_leads_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'val').mkdir()
    (tmp_path / 'link').symlink_to('val')
    calibrated_on = SimpleNamespace(
        samples=[[SimpleNamespace(metainfo=dict(img_path='val/1.jpg'))]])
    refuse_shared_images(calibrated_on, Paths(['val/2.jpg', 's3://val/1.jpg']), 'test')
    with pytest.raises(UsageError, match='1.jpg is both in the calibration set and in the test'):
        refuse_shared_images(
            calibrated_on, Paths(['val/2.jpg', path.format(here=tmp_path)]), 'test')


@pytest.mark.parametrize('split', ['train', 'test'])
def test_joined_datasets_want_one_that_calibrates(split):
    cfg = Config.fromfile(W4A4)
    cfg[f'{split}_dataloader'].dataset = dict(type='ConcatDataset', datasets=[{}, {}])
    with pytest.raises(UsageError, match=f'{split}_dataloader.dataset joins several datasets'):
        calibration_dataset_cfg(cfg)


def test_an_image_without_a_box_is_not_held_out_by_another():
    planned = Planned()
    planned.calibration = dict(held_out=3, views=2)
    planned.count([(8, 8)] * 12)  # 9 to learn from, twice, and 3
    assert planned.held_out_among(range(21)) == 3
    assert planned.held_out_among([0, 1, 9, 17, 19]) == 1
    assert planned.held_out_among([0, 1, 17]) == 0
