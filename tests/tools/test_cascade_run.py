"""A tiny cascade through tools/quant.py and tools/test.py, on generated shapes."""
import json

import demo_runs
import pytest
import tiny_cascade
import torch

from pfcr_mm.cli import quant_main
from pfcr_mm.cli import test_main as check_main
from pfcr_mm.datasets import CLASSES

ROI_PARTS = [f'roi_head.{kind}_head.{stage}' for kind in ('bbox', 'mask') for stage in range(3)]
DATA = '''
_base_ = '{base}'
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(128, 128), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs', meta_keys=(
                'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_dataloader = dict(dataset=dict(
    _delete_=True, type='pfcr_mm.ShapesDataset', data_root='{root}', split='train',
    num_images={images}, pipeline=pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    _delete_=True, type='pfcr_mm.ShapesDataset', data_root='{root}', split='val',
    num_images={val_images}, test_mode=True, pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='{root}annotations/instances_val.json')
test_evaluator = val_evaluator
'''


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(folder, config, options, exit code) of a run."""
    folder = tmp_path_factory.mktemp('cascade')
    config = folder / 'cascade.py'
    config.write_text(DATA.format(
        base=tiny_cascade.CONFIG, root=f"{folder / 'shapes'}/", images=demo_runs.IMAGES,
        val_images=demo_runs.VAL_IMAGES))
    torch.save(dict(meta={}, state_dict=tiny_cascade.build_float().state_dict()),
               folder / 'float.pth')
    quick = [o for o in demo_runs.quick_options(folder / 'shapes') if 'quantize_cfg' in o]
    options = (*tiny_cascade.TINY, *quick, *demo_runs.QUICK[:3], 'quantize_cfg.rois.proposals=12',
               'quantize_cfg.rois.detections=4', 'quantize_cfg.calibration.method=mse')
    code = quant_main(demo_runs.arguments(
        config, folder / 'float.pth', folder / 'run', options))
    return folder / 'run', config, options, code


def test_every_stage_is_reconstructed(run):
    folder, _, _, code = run
    assert code == 0
    report = json.loads((folder / 'report.json').read_text())
    assert report['parts_without_chain'] == {} and report['model'] == 'CascadeRCNN'
    chains = [unit['chain'] for unit in report['units']]
    assert list(dict.fromkeys(chains)) == ['backbone', 'neck', 'rpn_head', *ROI_PARTS]
    assert all(unit['loss_after'] <= unit['loss_before'] or not unit['accepted']
               for unit in report['units'])


def test_the_file_holds_integers_in_folded_form(run):
    folder, *_ = run
    state = torch.load(folder / 'quantized.pth', weights_only=True)['state_dict']
    assert not any('.bn.' in key for key in state)
    for stage in range(3):
        conv = f'roi_head.bbox_head.{stage}.shared_convs.0.conv'
        assert f'{conv}.weight_packed' in state and f'{conv}.bias' in state
        assert f'{conv}.weight' not in state


def test_reloaded_it_measures_the_same(run, capsys):
    folder, config, options, _ = run
    assert check_main(demo_runs.arguments(
        config, folder / 'quantized.pth', folder / 'test', options)) == 0
    report = json.loads((folder / 'report.json').read_text())
    printed = capsys.readouterr().out.splitlines()
    for key, value in report['quantized'].items():
        assert f'{key}: {value:.4f}' in printed


def test_classes_are_the_data_sets(run):
    folder, *_ = run
    meta = torch.load(folder / 'quantized.pth', weights_only=True)['meta']
    assert tuple(meta['dataset_meta']['classes']) == CLASSES
