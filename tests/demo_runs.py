"""End-to-end runs of the demo config, shrunken: few images, one iteration a unit.

Each run is made once a session and shared by the tests of tools/ and engine/.
"""
import functools
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from pfcr_mm.cli import quant_main
from pfcr_mm.models.checkpoint import ASSETS

REPO = Path(__file__).parents[1]
FLOAT = REPO / 'configs' / 'demo' / 'mask-rcnn_swin-demo_shapes.py'
W4A4 = REPO / 'configs' / 'demo' / 'pfcr_maskrcnn_swin_demo_w4a4.py'
# The demo's own float checkpoint; another one can stand in while it is being trained.
ASSET = Path(os.environ.get('PFCR_MM_DEMO_CHECKPOINT', ASSETS / 'demo_mask_rcnn_swin.pth'))
IMAGES, HELD_OUT, VAL_IMAGES = 12, 4, 6
LEVELS = ('leaf', 'block', 'pair', 'stage', 'backbone')

# Every level still has a unit: stage 2 holds two pairs of blocks.
TINY = (
    'model.backbone.embed_dims=8', 'model.backbone.depths=[1,1,4,1]',
    'model.backbone.num_heads=[1,1,2,2]', 'model.neck.in_channels=[8,16,32,64]',
    'model.neck.out_channels=16', 'model.rpn_head.in_channels=16',
    'model.rpn_head.feat_channels=16', 'model.roi_head.bbox_roi_extractor.out_channels=16',
    'model.roi_head.bbox_head.in_channels=16', 'model.roi_head.bbox_head.fc_out_channels=32',
    'model.roi_head.mask_roi_extractor.out_channels=16', 'model.roi_head.mask_head.num_convs=1',
    'model.roi_head.mask_head.in_channels=16', 'model.roi_head.mask_head.conv_out_channels=16',
    'model.test_cfg.rpn.max_per_img=30', 'model.test_cfg.rcnn.max_per_img=10')
# One finest sweep, nothing measured but the result, no report.html.
QUICK = ('quantize_cfg.levels=[leaf]', 'quantize_cfg.head_levels=[leaf]',
         'quantize_cfg.pos.mode=off', 'quantize_cfg.evaluate.float=False',
         'quantize_cfg.evaluate.calibrated=False', 'quantize_hooks.6.enabled=False',
         'quantize_cfg.calibration.method=minmax')


def load_tool(name):
    """The module tools/NAME.py, anew."""
    spec = importlib.util.spec_from_file_location(Path(name).name, REPO / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Run:
    """A finished quantization."""

    folder: Path
    options: tuple
    checkpoint: Path  # float
    code: int

    @property
    def quantized(self):
        return self.folder / 'quantized.pth'

    @property
    def report(self):
        return json.loads((self.folder / 'report.json').read_text())

    def config(self):
        """The config of the run, flat, as it was written."""
        return Config.fromfile(self.folder / W4A4.name)


def data_options(root, images=IMAGES, val_images=VAL_IMAGES):
    """Options that draw a small data set below `root`."""
    root = f'{root}/'
    ann_file = f'{root}annotations/instances_val.json'
    return (
        *(f'{name}_dataloader.dataset.data_root={root}' for name in ('train', 'val', 'test')),
        f'val_evaluator.ann_file={ann_file}', f'test_evaluator.ann_file={ann_file}',
        f'train_dataloader.dataset.num_images={images}',
        f'val_dataloader.dataset.num_images={val_images}',
        f'test_dataloader.dataset.num_images={val_images}')


def quick_options(root):
    """Options of a run with one iteration a unit on the small data below `root`."""
    return (
        *data_options(root), f'quantize_cfg.calibration.images={IMAGES}',
        f'quantize_cfg.calibration.held_out={HELD_OUT}',
        'quantize_cfg.calibration.search_images=4', 'quantize_cfg.calibration.rows=128',
        'quantize_cfg.reconstruction.iters=1', 'quantize_cfg.head_reconstruction.iters=1',
        *(f'quantize_cfg.head_reconstruction.per_level.{level}.iters=1'
          for level in ('leaf', 'chain')),
        *(f'quantize_cfg.reconstruction.per_level.{level}.iters=1'
          for level in ('leaf', 'pair', 'stage', 'backbone')))


def options_as_dict(options):
    """'a.b=1' strings as `--cfg-options` reads them."""
    import argparse

    from mmengine.config import DictAction
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='+', action=DictAction)
    return parser.parse_args(['--options', *options]).options


def arguments(config, checkpoint, folder, options):
    """Command-line arguments of tools/quant.py and tools/test.py."""
    return [str(config), *([str(checkpoint)] if checkpoint else []), '--work-dir', str(folder),
            '--cfg-options', *options]


def run_tool(name, *args, cwd=REPO, env=None):
    """Run tools/NAME in a new process."""
    return subprocess.run(
        [sys.executable, str(REPO / 'tools' / name), *map(str, args)], cwd=cwd, text=True,
        capture_output=True, env={**os.environ, **(env or {})})


def save_tiny(path, seed=0, change=None):
    """Save a float checkpoint of the tiny detector with seeded weights.

    Args:
        path (Path): file to write.
        seed (int): of the weights.
        change (callable | None): gets the state dict, to edit it.
    """
    cfg = Config.fromfile(FLOAT)
    cfg.merge_from_dict(options_as_dict(TINY))
    init_default_scope('mmdet')
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        detector = MODELS.build(dict(cfg.model, _scope_='mmdet'))
        detector.init_weights()
        state = detector.state_dict()
        generator = torch.Generator().manual_seed(seed)
        for key, value in state.items():  # initial predictors say nothing; make them speak
            if key.rpartition('.')[0].endswith(('rpn_cls', 'rpn_reg', 'fc_cls', 'conv_logits')):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
    if change is not None:
        change(state)
    torch.save(dict(meta={}, state_dict=state), path)
    return path


def _folder(path):
    path.mkdir(parents=True)
    return path


@functools.cache
def tiny_run(base):
    """The whole of tools/quant.py on a tiny detector with random weights, all levels."""
    folder = _folder(base / 'tiny')
    options = (*TINY, *quick_options(base / 'shapes'))
    checkpoint = save_tiny(folder / 'float.pth')
    code = quant_main(arguments(W4A4, checkpoint, folder / 'run', options))
    return Run(folder / 'run', options, checkpoint, code)


@functools.cache
def demo_run(base):
    """The demo detector itself, on few images; its AP is above zero."""
    folder = _folder(base / 'demo')
    options = (*quick_options(base / 'shapes'), *QUICK[:3],
               'quantize_cfg.evaluate.calibrated=False')
    code = quant_main(arguments(W4A4, ASSET, folder / 'run', options))
    return Run(folder / 'run', options, ASSET, code)
