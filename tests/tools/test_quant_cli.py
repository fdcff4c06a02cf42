"""tools/quant.py and tools/test.py, from config to report."""
import json

import demo_runs
import pytest
import torch
from demo_runs import W4A4, arguments, run_tool

from pfcr_mm.cli import quant_main, test_main
from pfcr_mm.modules import QuantLayer

test_main.__test__ = False  # a command line, no test

METRICS = {'bbox_mAP': float, 'segm_mAP': float}
# DESIGN, 'Contracts': what report.json must hold; it may hold more beside.
REPORT = {
    'model': str, 'bits': {'weight': int, 'activation': int}, 'float': METRICS,
    'calibrated': METRICS, 'quantized': METRICS, 'size_mb': {'float': float, 'quantized': float},
    'seconds': float, 'peak_memory_mb': float, 'calibration': {'images': int, 'split': str},
    'seed': int, 'units': list, 'layers': list,
}
UNIT = {
    'name': str, 'chain': str, 'level': str, 'pos_stage': int, 'loss_before': float,
    'loss_after': float, 'accepted': bool, 'iters': int, 'seconds': float, 'peak_memory_mb': float,
}
BITS = (int, type(None))
LAYER = {
    'name': str, 'kind': str, 'weight_bits': BITS, 'activation_bits': BITS,
    'skipped_reason': (str, type(None)),
}


def check_schema(value, schema, where='report', exact=False):
    """Every key of `schema` is there with its type; with `exact`, no other is."""
    assert set(schema) <= set(value), f'{where} lacks {set(schema) - set(value)}'
    if exact:
        assert set(schema) == set(value), f'{where} has {set(value) - set(schema)} beside'
    for key, kind in schema.items():
        if isinstance(kind, dict):
            check_schema(value[key], kind, f'{where}.{key}', exact=True)
        else:
            assert isinstance(value[key], kind), f'{where}.{key} is {value[key]!r}'


def codes(path):
    """The packed integers of a quantized checkpoint, by layer."""
    state = torch.load(path, weights_only=True)['state_dict']
    return {k: v for k, v in state.items() if k.endswith('.weight_packed')}


def printed_table(text):
    """Rows of the result table, as lists of cells."""
    rows = [line.strip().strip('|').split('|') for line in text.splitlines()
            if line.startswith('| ')]
    return [[cell.strip() for cell in row] for row in rows]


# --- the run and what it leaves ---------------------------------------------

def test_run_succeeds(tiny_run):
    assert tiny_run.code == 0


@pytest.mark.parametrize('name', ['quantized.pth', 'report.json', 'report.md', 'units.jsonl',
                                  W4A4.name])
def test_run_writes(tiny_run, name):
    assert (tiny_run.folder / name).stat().st_size > 0


def test_no_half_written_file_stays(tiny_run):
    assert not [p.name for p in tiny_run.folder.iterdir() if p.name.startswith('.')]


def test_report_schema(tiny_run):
    report = tiny_run.report
    check_schema(report, REPORT)
    assert report['units'] and report['layers']
    for unit in report['units']:
        check_schema(unit, UNIT, unit['name'], exact=True)
    for layer in report['layers']:
        check_schema(layer, LAYER, layer['name'], exact=True)


def test_report_values(tiny_run):
    report = tiny_run.report
    assert report['model'] == 'MaskRCNN'
    assert report['bits'] == {'weight': 4, 'activation': 4}
    assert report['calibration'] == {'images': demo_runs.IMAGES, 'split': 'train'}
    assert report['seed'] == 0
    assert {u['level'] for u in report['units']} >= set(demo_runs.LEVELS)
    assert {u['pos_stage'] for u in report['units']} == {1, 2}
    assert all(u['iters'] == 1 for u in report['units'])
    assert all(u['loss_after'] < u['loss_before'] for u in report['units'] if u['accepted'])
    assert report['size_mb']['quantized'] == pytest.approx(
        tiny_run.quantized.stat().st_size / 1e6, abs=1e-6)


def test_unit_log_repeats_the_report(tiny_run):
    lines = [json.loads(line)
             for line in (tiny_run.folder / 'units.jsonl').read_text().splitlines()]
    assert [{k: line[k] for k in UNIT} for line in lines] == tiny_run.report['units']
    assert all(line['curve'] for line in lines)


def test_report_tells_every_layer_once(tiny_run):
    names = [layer['name'] for layer in tiny_run.report['layers']]
    assert len(names) == len(set(names))


def test_markdown_has_the_table(tiny_run):
    rows = printed_table((tiny_run.folder / 'report.md').read_text())
    assert rows[0] == ['', 'box AP', 'mask AP', 'size (MB)']
    assert [row[0] for row in rows[1:4]] == ['float', 'W4A4 calibrated only', 'W4A4 PFCR']


def test_written_config_is_flat(tiny_run):
    text = (tiny_run.folder / W4A4.name).read_text()
    assert '_base_ =' not in text
    assert tiny_run.config().quantize_cfg.reconstruction.iters == 1


def test_checkpoint_holds_integers_and_no_float_weight(tiny_run):
    state = torch.load(tiny_run.quantized, weights_only=True)['state_dict']
    packed = codes(tiny_run.quantized)
    quantized = [layer['name'] for layer in tiny_run.report['layers'] if layer['weight_bits']]
    assert {f'{name}.weight_packed' for name in quantized} == set(packed)
    assert all(v.dtype == torch.uint8 for v in packed.values())
    assert not {f'{name}.weight' for name in quantized} & set(state)


# --- again ------------------------------------------------------------------

def test_same_seed_gives_the_same_integers(tiny_run, tmp_path, capsys):
    """Also without what only watches the run: diagnostics and scalars change no byte."""
    plain = tmp_path / 'plain.py'
    hooks = [dict(hook) for hook in tiny_run.config().quantize_hooks
             if hook.type not in ('pfcr_mm.DiagnosticsHook', 'pfcr_mm.ScalarsHook')]
    assert len(hooks) == len(tiny_run.config().quantize_hooks) - 2
    plain.write_text(f'_base_ = [{str(W4A4)!r}]\nquantize_hooks = {hooks!r}\n')
    assert quant_main(arguments(plain, tiny_run.checkpoint, tmp_path, tiny_run.options)) == 0
    assert not (tmp_path / 'report.html').exists()
    assert (tmp_path / 'quantized.pth').read_bytes() == tiny_run.quantized.read_bytes()
    rows = printed_table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ['', 'float', 'W4A4 calibrated only', 'W4A4 PFCR']
    first, second = codes(tiny_run.quantized), codes(tmp_path / 'quantized.pth')
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def test_another_seed_gives_other_integers(tiny_run, tmp_path):
    options = (*tiny_run.options, 'randomness.seed=1')
    assert quant_main(arguments(W4A4, tiny_run.checkpoint, tmp_path, options)) == 0
    assert json.loads((tmp_path / 'report.json').read_text())['seed'] == 1
    first, second = codes(tiny_run.quantized), codes(tmp_path / 'quantized.pth')
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_the_val_split_and_views(tiny_run, tmp_path):
    """Where both splits are one, both figures are; views are no images."""
    options = (*tiny_run.options, 'quantize_cfg.evaluate.val=True',
               'quantize_cfg.calibration.views=3')
    assert quant_main(arguments(W4A4, tiny_run.checkpoint, tmp_path, options)) == 0
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['val'] == {s: report[s] for s in ('float', 'calibrated', 'quantized')}
    assert report['calibration'] == tiny_run.report['calibration']
    assert tiny_run.report['val'] is None
    first, second = codes(tiny_run.quantized), codes(tmp_path / 'quantized.pth')
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_mixed_precision_reaches_every_part(tiny_run, tmp_path):
    """Nothing dies of half precision, and held-out losses before learning stay float32's."""
    options = (*tiny_run.options, 'quantize_cfg.reconstruction.autocast=bfloat16',
               'quantize_cfg.head_reconstruction.autocast=float16',
               'quantize_cfg.evaluate.float=False', 'quantize_cfg.evaluate.calibrated=False')
    assert quant_main(arguments(W4A4, tiny_run.checkpoint, tmp_path, options)) == 0
    units = json.loads((tmp_path / 'report.json').read_text())['units']
    assert [u['name'] for u in units] == [u['name'] for u in tiny_run.report['units']]
    first, plain = units[0], tiny_run.report['units'][0]
    assert first['loss_before'] == plain['loss_before']
    assert first['loss_after'] != plain['loss_after']
    for unit in units:
        assert unit['loss_after'] == unit['loss_after'], unit  # no NaN
    checkpoint = torch.load(tmp_path / 'quantized.pth', weights_only=True)['state_dict']
    assert not any(v.dtype in (torch.float16, torch.bfloat16) for v in checkpoint.values())


def test_new_process_measures_the_same_ap(demo_run, tmp_path):
    assert demo_run.code == 0
    saved = demo_run.report['quantized']
    assert saved['bbox_mAP'] > 0.05 and saved['segm_mAP'] > 0.05
    done = run_tool('test.py', *arguments(W4A4, demo_run.quantized, tmp_path, demo_run.options))
    assert done.returncode == 0, done.stderr
    for key, value in saved.items():
        assert f'{key}: {value:.4f}' in done.stdout.splitlines()


def test_new_process_on_the_written_config(tiny_run, tmp_path):
    config = tiny_run.folder / W4A4.name
    done = run_tool('test.py', config, tiny_run.quantized, '--work-dir', tmp_path)
    assert done.returncode == 0, done.stderr
    for key, value in tiny_run.report['quantized'].items():
        assert f'{key}: {value:.4f}' in done.stdout.splitlines()


def test_demo_checkpoint_is_the_configs_default():
    from mmengine.config import Config
    assert Config.fromfile(W4A4).load_from == 'pfcr_mm://demo_mask_rcnn_swin.pth'


def test_dry_run_prints_the_plan_and_stops(tiny_run, tmp_path, capsys):
    args = arguments(W4A4, tiny_run.checkpoint, tmp_path, tiny_run.options)
    assert quant_main([*args[:2], '--dry-run', *args[2:]]) == 0
    plan = capsys.readouterr().out
    assert 'W4A4' in plan and f'{demo_runs.IMAGES} training images' in plan and 'MB' in plan
    for part in ('backbone', 'neck', 'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head'):
        assert part in plan
    assert not list(tmp_path.rglob('*.pth')) and not (tmp_path / 'report.json').exists()


# --- odd input that must work -----------------------------------------------

def quantize(checkpoint, folder, options):
    """Run quant_main; returns (exit code, report, quantized state dict)."""
    code = quant_main(arguments(W4A4, checkpoint, folder, options))
    report = json.loads((folder / 'report.json').read_text())
    state = torch.load(folder / 'quantized.pth', weights_only=True)['state_dict']
    return code, report, state


def all_finite(state):
    return all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_calibration_image_without_proposals(tiny_run, tiny_options, tmp_path, monkeypatch):
    from mmdet.models import RPNHead
    predict = RPNHead.predict

    def without_some(self, maps, samples, rescale=False):
        found = predict(self, maps, samples, rescale=rescale)
        return [boxes[:0] if sample.img_id % 3 == 0 else boxes
                for boxes, sample in zip(found, samples)]

    monkeypatch.setattr(RPNHead, 'predict', without_some)
    code, report, state = quantize(tiny_run.checkpoint, tmp_path / 'run', tiny_options)
    assert code == 0 and all_finite(state)
    assert {u['chain'] for u in report['units']} >= {'roi_head.bbox_head', 'roi_head.mask_head'}


def test_no_calibration_image_has_proposals(tiny_run, tiny_options, tmp_path):
    options = (*tiny_options, 'model.test_cfg.rpn.min_bbox_size=1000')
    code, report, state = quantize(tiny_run.checkpoint, tmp_path / 'run', options)
    assert code == 0 and all_finite(state)
    unreached = {layer['name'] for layer in report['layers']
                 if layer['skipped_reason'] == 'no calibration data reached it'}
    assert 'roi_head.bbox_head.fc_cls' in unreached
    assert any('roi_head.mask_head' in note for note in report['notes'])
    assert test_main(arguments(W4A4, tmp_path / 'run' / 'quantized.pth', tmp_path, options)) == 0


def test_constant_channels_and_images(tiny_options, tmp_path):
    import cv2
    import numpy as np

    from pfcr_mm.datasets import write_shapes

    def silence(state):
        for key, value in state.items():
            if 'norm' in key and key.endswith('weight'):
                value[0] = 0  # the channel is its bias: a constant, or zero
            elif key.endswith('weight') and value.dim() >= 2:
                value[0] = 0
        state['backbone.stages.0.blocks.0.norm1.weight'].zero_()
        state['backbone.stages.0.blocks.0.norm1.bias'].zero_()

    checkpoint = demo_runs.save_tiny(tmp_path / 'float.pth', change=silence)
    write_shapes(tmp_path / 'shapes', 'train', demo_runs.IMAGES)
    for index in (0, 1):
        path = tmp_path / 'shapes' / 'train' / f'{index:06d}.png'
        cv2.imwrite(str(path), np.zeros((128, 128, 3), np.uint8))
    options = (*tiny_options, 'quantize_cfg.calibration.method=output',
               'quantize_cfg.pos.mode=quantizer')
    code, report, state = quantize(checkpoint, tmp_path / 'run', options)
    assert code == 0 and all_finite(state)
    assert all(u['loss_after'] == u['loss_after'] for u in report['units'])  # no NaN


def test_quant_layers_of_the_tiny_detector(tiny_run):
    """The tiny detector has every kind of layer that the demo has."""
    from mmengine.registry import MODELS
    detector = MODELS.build(tiny_run.config().model)
    kinds = {type(m).__name__ for m in detector.modules() if isinstance(m, QuantLayer)}
    assert kinds == {'QuantLinear', 'QuantConv2d', 'QuantConvTranspose2d'}
