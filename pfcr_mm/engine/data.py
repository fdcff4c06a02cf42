"""Calibration images: from the training split, through the test pipeline."""
import copy
import os
from pathlib import Path

import cv2
import torch
from mmengine.dataset import pseudo_collate

from .. import parallel
from ..errors import FaultError, UsageError
from ..models.chain import State
from ..reconstruction.cache import FeatureCache, Shelf
from ..reconstruction.capture import Images
from ..registry import DATASETS


def calibration_images(cfg, model, count, seed, dataset=None, note=None, cache=None):
    """Draw and preprocess calibration images; of several processes each loads its share.

    Args:
        cfg (Config): with `train_dataloader` and `test_dataloader`.
        model (nn.Module): its data preprocessor normalises and pads.
        count (int): how many images; fewer where the split is smaller.
        seed (int): draws them.
        dataset (dict | None): a dataset config of the user's own.
        note (callable | None): told of images that are left out, where the dataset allows
            that (`skips_broken`).
        cache (FeatureCache | None): keeps the inputs, in float32.

    Returns:
        Images: numbered in the order they are drawn in, those that are left out not counted.
    """
    shelf = Shelf(cache or FeatureCache())
    dataset_cfg = dataset or calibration_dataset_cfg(cfg)
    check_dataset(dataset_cfg, 'calibration')
    try:
        dataset = DATASETS.build(dataset_cfg)
    except ValueError as error:  # MMEngine cannot serialise an empty list of images
        if 'need at least one array to concatenate' not in str(error):
            raise
        dataset = ()
    if len(dataset) == 0 or count <= 0:
        raise UsageError(
            'the calibration set is empty: quantize_cfg.calibration.images is '
            f'{count}, the training split has {len(dataset)} images')
    order = torch.randperm(
        len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    images, good = {}, []  # by place in the order; places of all that can be read
    tried = 0
    while len(good) < count and tried < len(order):
        places = range(tried, min(len(order), tried + count - len(good)))
        broken = {}
        for place in places[parallel.rank()::parallel.world_size()]:
            try:
                sample = load_sample(dataset, order[place])
            except UsageError as error:
                if not getattr(dataset, 'skips_broken', False):
                    raise
                broken[place] = str(error)
                continue
            data = model.data_preprocessor(pseudo_collate([sample]), False)
            images[place] = (shelf.keep(State((data['inputs'], ))),
                             [_without_truth(one) for one in data['data_samples']])
        broken = {place: why for part in parallel.gather(broken) for place, why in part.items()}
        for place in sorted(broken):
            note(f'{broken[place]}; it is left out of calibration')
        good += [place for place in places if place not in broken]
        tried = places.stop
    if not good:
        raise UsageError('the calibration set is empty: none of its images can be read')
    number_of = {place: number for number, place in enumerate(good)}
    states, samples = zip(*images.values()) if images else ((), ())
    return Images(states, samples, [number_of[place] for place in images])


def _without_truth(sample):
    """A data sample without ground truth: its masks can be larger than the image."""
    for key in [k for k in sample.keys() if k.startswith('gt_') or k == 'ignored_instances']:
        delattr(sample, key)
    return sample


def refuse_shared_images(images, dataset, split):
    """Raise UsageError where an image that calibrates would also be evaluated on.

    Args:
        images (Images): from `calibration_images`.
        dataset (Dataset): what is about to be evaluated on.
        split (str): its name, 'test' or 'val'.
    """
    used = {_real(sample.metainfo.get('img_path')) for samples in images.samples
            for sample in samples}
    for index in range(len(dataset) if hasattr(dataset, 'get_data_info') else 0):
        path = dataset.get_data_info(index).get('img_path')
        if path and _real(path) in used:
            raise UsageError(
                f'image {path} is both in the calibration set and in the {split} set: figures '
                'would be too good; calibrate on other images')


def _real(path):
    """A path as the file system has it, whatever way leads there."""
    return path if not path or '://' in path else os.path.realpath(path)


def calibration_dataset_cfg(cfg):
    """The training dataset with the test pipeline and without ground-truth filters."""
    if cfg.get('train_dataloader') is None:
        raise UsageError('the config has no train_dataloader, which calibration images come from')
    train, test = (innermost(cfg[key].dataset) for key in ('train_dataloader', 'test_dataloader'))
    for key, found in (('train', train), ('test', test)):
        if 'datasets' in found:
            raise UsageError(
                f'{key}_dataloader.dataset joins several datasets: say in '
                'quantize_cfg.calibration.dataset which one calibrates, with its pipeline')
    train = copy.deepcopy(train)
    train.pipeline = copy.deepcopy(test.pipeline)
    train.test_mode = True
    train.pop('filter_cfg', None)
    return train


def innermost(dataset_cfg):
    """The config inside RepeatDataset, MultiImageMixDataset and their like."""
    while 'dataset' in dataset_cfg:
        dataset_cfg = dataset_cfg.dataset
    return dataset_cfg


def nominal_size(cfg):
    """(H, W) of the largest landscape input that the test pipeline makes, padding included.

    From the config alone: what `Resize` and `Pad` say, else 800 x 1333.
    """
    test = innermost(cfg.test_dataloader.dataset)
    width, height = 1333, 800
    for step in test.get('pipeline', ()):
        kind = str(step.get('type')).rpartition('.')[2]
        if kind == 'Resize' and step.get('scale'):
            scale = step.scale if isinstance(step.scale, (tuple, list)) else (step.scale, ) * 2
            width, height = (max(scale), min(scale)) if step.get('keep_ratio') else scale
        elif kind == 'Pad' and step.get('size'):
            width, height = max(width, step.size[0]), max(height, step.size[1])
    divisor = cfg.model.get('data_preprocessor', {}).get('pad_size_divisor', 1)
    return tuple(-(-side // divisor) * divisor for side in (height, width))


def load_sample(dataset, index):
    """`dataset[index]`, with an unreadable image told by its path."""
    try:
        return dataset[index]
    except Exception:
        check_image(dataset, index)
        raise


def check_dataset(dataset_cfg, role):
    """Raise UsageError where the annotation file of a dataset config is missing."""
    path = annotation_file(dataset_cfg)
    if path is not None and not path.exists():
        raise UsageError(
            f'{role}: annotation file {path} is missing; COCO belongs in data/coco/ '
            '(annotations/, train2017/, val2017/), other data where data_root says. '
            'The configs in configs/demo/ need no data')


def annotation_file(dataset_cfg):
    """Path of the annotation file that a dataset config reads; None where it names none here."""
    name = dataset_cfg.get('source') or dataset_cfg.get('ann_file')
    if not name or '://' in str(name):
        return None
    return Path(dataset_cfg.get('data_root') or '.', name)


def check_worker(error):
    """Raise FaultError where a data loading process has died."""
    if isinstance(error, RuntimeError) and str(error).startswith('DataLoader worker'):
        line = str(error).strip().splitlines()[0]
        raise FaultError(
            f'a data loading process died ({line}): it may have run out of memory; try '
            'test_dataloader.num_workers=0 with persistent_workers=False; --resume goes on'
        ) from None


def check_images(dataset):
    """Raise UsageError for the first image of a dataset that is missing or unreadable."""
    for index in range(len(dataset)):
        check_image(dataset, index)


def check_image(dataset, index):
    """Raise UsageError where one image of a dataset is missing or unreadable."""
    if hasattr(dataset, 'check_image'):  # it knows better how it reads
        dataset.check_image(index)
        return
    path = dataset.get_data_info(index).get('img_path', '')
    if not path or '://' in path:
        return
    if not Path(path).exists():
        raise UsageError(f'image {path} is missing')
    if cv2.imread(path) is None:
        raise UsageError(f'image {path} cannot be read as an image')
