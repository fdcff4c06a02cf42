"""Hooks, loop and runner as MMEngine sees them."""
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import demo_runs
import pytest
import torch
from demo_runs import FLOAT, options_as_dict
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, LOOPS, MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint
from mmengine.structures import BaseDataElement

from pfcr_mm.cli import quant_main
from pfcr_mm.engine import ExpectedMetricsHook, ManifestGuardHook, PFCRLoop, QuantRunner
from pfcr_mm.errors import UsageError

NAMES = ('AgreementHook', 'ExpectedMetricsHook', 'ManifestGuardHook', 'ProgressHook', 'ReportHook',
         'ScalarsHook', 'UnitLogHook', 'DiagnosticsHook')


@pytest.mark.parametrize('name', NAMES)
def test_hook_builds_from_a_dict(name):
    hook = HOOKS.build(dict(type=f'pfcr_mm.{name}'))
    assert isinstance(hook, Hook) and type(hook).__name__ == name


def test_hook_takes_its_arguments():
    assert HOOKS.build(dict(type='pfcr_mm.UnitLogHook', interval=3)).interval == 3
    assert HOOKS.build(dict(type='pfcr_mm.ExpectedMetricsHook', tolerance=0.1)).tolerance == 0.1


def test_loop_and_runner_are_registered():
    assert LOOPS.get('pfcr_mm.PFCRLoop') is PFCRLoop
    assert RUNNERS.get('pfcr_mm.QuantRunner') is QuantRunner


def test_a_type_needs_no_import_of_ours():
    script = ('from mmengine.registry import HOOKS\n'
              "print(type(HOOKS.build(dict(type='pfcr_mm.ManifestGuardHook'))).__name__)")
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.stdout.split()[-1] == 'ManifestGuardHook', done.stderr


# --- AgreementHook -----------------------------------------------------------

def test_agreement_by_hand():
    """Of two images one is new to it: the float twin is asked."""
    def sample(path, *scores):
        return BaseDataElement(img_path=path, pred_scores=torch.tensor(scores))

    asked = []
    twin = SimpleNamespace(test_step=lambda batch: asked.append(batch) or [sample('b', 0.2, 0.8)])
    loop = SimpleNamespace(teacher=twin, open_phase=SimpleNamespace(name='evaluate float'))
    runner = SimpleNamespace(quantize_loop=loop)
    hook = HOOKS.build(dict(type='pfcr_mm.AgreementHook'))
    found = []
    for phase, batches in (('float', [sample('a', 0.5, 0.5)]),
                           ('quantized', [sample('a', 0.25, 0.75), sample('b', 0.8, 0.2)])):
        loop.open_phase.name = f'evaluate {phase}'
        hook.before_test_epoch(runner)
        for number, output in enumerate(batches):
            hook.after_test_iter(runner, number, 'batch', [output])
        found.append({'imagenet/top1': 0.5})
        hook.after_test_epoch(runner, found[-1])
    assert asked == ['batch']
    assert found[0] == {'imagenet/top1': 0.5, 'imagenet/kl': 0, 'imagenet/same': 1}
    by_hand = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2 + 0.6 * math.log(4) / 2
    assert found[1]['imagenet/kl'] == pytest.approx(by_hand, rel=1e-6)
    assert found[1]['imagenet/same'] == 0


def test_agreement_leaves_detectors_alone():
    hook, metrics = HOOKS.build(dict(type='pfcr_mm.AgreementHook')), {'coco/bbox_mAP': 0.5}
    hook.after_test_iter(None, 0, None, [BaseDataElement(pred_instances=None)])
    hook.after_test_epoch(None, metrics)
    assert metrics == {'coco/bbox_mAP': 0.5}


@pytest.mark.parametrize('runner', [
    SimpleNamespace(), SimpleNamespace(quantize_loop=SimpleNamespace(open_phase=None))],
    ids=['stock runner', 'tools/sensitivity.py'])
def test_agreement_outside_a_run(runner):
    hook, metrics = HOOKS.build(dict(type='pfcr_mm.AgreementHook')), {'imagenet/top1': 0.5}
    hook.before_test_epoch(runner)
    scores = BaseDataElement(img_path='a', pred_scores=torch.tensor([0.5, 0.5]))
    hook.after_test_iter(runner, 0, None, [scores])
    hook.after_test_epoch(runner, metrics)
    assert metrics == {'imagenet/top1': 0.5}


# --- ManifestGuardHook in a stock Runner ------------------------------------

@MODEL_WRAPPERS.register_module(force=True)
class Wrapper(torch.nn.Module):
    """As a distributed one, it has its own attributes only."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def stock_runner(run, checkpoint, folder, quantized):
    """MMEngine's own Runner on the tiny detector, guarded."""
    cfg = run.config()
    if not quantized:
        float_cfg = Config.fromfile(FLOAT)
        float_cfg.merge_from_dict(options_as_dict(run.options))
        cfg.model = float_cfg.model
    for key in ('runner_type', 'quantize_cfg', 'quantize_hooks'):
        cfg.pop(key, None)
    cfg.custom_hooks = [dict(type='pfcr_mm.ManifestGuardHook')]
    cfg.load_from, cfg.work_dir = str(checkpoint), str(folder)
    return Runner.from_cfg(cfg)


def test_guard_refuses_quantized_weights_in_a_float_model(tiny_run, tmp_path):
    runner = stock_runner(tiny_run, tiny_run.quantized, tmp_path, quantized=False)
    with pytest.raises(UsageError, match='the checkpoint is quantized and the model is float'):
        runner.test()


def test_guard_refuses_float_weights_in_a_quantized_model(tiny_run, tmp_path):
    runner = stock_runner(tiny_run, tiny_run.checkpoint, tmp_path, quantized=True)
    with pytest.raises(UsageError, match='the checkpoint holds float weights'):
        runner.test()


def test_guard_refuses_other_bits(tiny_run, tmp_path):
    runner = stock_runner(tiny_run, tiny_run.quantized, tmp_path, quantized=True)
    runner.model.census[1].activation_bits = 7
    with pytest.raises(UsageError, match='activation_bits'):
        runner.test()


def test_guard_looks_into_a_distributed_wrapper(tiny_run, tmp_path):
    runner = stock_runner(tiny_run, tiny_run.quantized, tmp_path, quantized=True)
    quantized, plain = (_load_checkpoint(str(p), map_location='cpu')
                        for p in (tiny_run.quantized, tiny_run.checkpoint))
    wrapped = SimpleNamespace(model=Wrapper(runner.model))
    ManifestGuardHook().after_load_checkpoint(wrapped, quantized)
    with pytest.raises(UsageError, match='the checkpoint holds float weights'):
        ManifestGuardHook().after_load_checkpoint(wrapped, plain)


@pytest.mark.parametrize('quantized', [False, True], ids=['float', 'quantized'])
def test_guard_lets_the_right_kind_pass(quantized, tiny_run, tmp_path):
    checkpoint = tiny_run.quantized if quantized else tiny_run.checkpoint
    runner = stock_runner(tiny_run, checkpoint, tmp_path, quantized)
    assert 'coco/bbox_mAP' in runner.test()


def test_stock_runner_measures_the_same(demo_run, tmp_path):
    metrics = stock_runner(demo_run, demo_run.quantized, tmp_path, quantized=True).test()
    saved = demo_run.report['quantized']
    assert {key: metrics[f'coco/{key}'] for key in saved} == saved
    assert saved['bbox_mAP'] > 0


def test_guard_says_nothing_of_a_float_pair():
    runner = SimpleNamespace(model=object())
    ManifestGuardHook().after_load_checkpoint(runner, dict(state_dict={}, meta=None))


# --- ScalarsHook -----------------------------------------------------------

def test_scalars_reach_the_visualizer(tiny_run):
    """MMEngine's own backend has written the losses that the report has."""
    path, = tiny_run.folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    units = tiny_run.report['units']

    def told(name):
        return [(line['step'], line[name]) for line in lines if name in line]

    assert told('unit/loss_after') == [
        (i, pytest.approx(u['loss_after'])) for i, u in enumerate(units, 1)]
    assert [v for _, v in told('unit/accepted')] == [int(u['accepted']) for u in units]
    steps = [step for step, _ in told('quantize/loss')]
    assert steps == list(range(len(units)))  # one iteration a unit
    for state in ('float', 'calibrated', 'quantized'):
        assert told(f'{state}/bbox_mAP')[0][1] == pytest.approx(
            tiny_run.report[state]['bbox_mAP'])


def test_scalars_go_on_where_a_run_was():
    told = []
    loop = SimpleNamespace(
        records=[SimpleNamespace(iters=30), SimpleNamespace(iters=12)],
        metrics=dict(float=dict(bbox_mAP=0.5)))
    runner = SimpleNamespace(quantize_loop=loop, visualizer=SimpleNamespace(
        add_scalar=lambda *args: told.append(args)))
    hook = HOOKS.build(dict(type='pfcr_mm.ScalarsHook', interval=5))
    hook.before_quantize(runner)
    for step in range(7):
        hook.unit_step(runner, step, SimpleNamespace(item=lambda: 0.25))
    loop.metrics['quantized'] = dict(bbox_mAP=0.4)
    hook.after_quantize(runner)
    assert told == [('quantize/loss', 0.25, 42), ('quantize/loss', 0.25, 47),
                    ('quantized/bbox_mAP', 0.4, 42)]


# --- ExpectedMetricsHook ----------------------------------------------------

@pytest.mark.parametrize('measured, noted', [
    (0.4610, False), (0.4580, False), (0.4575, True), (0.4700, True)])
def test_expected_metrics(measured, noted):
    notes = []
    loop = SimpleNamespace(
        metrics=dict(float=dict(bbox_mAP=measured)), note=notes.append,
        expected=dict(bbox_mAP=0.460, segm_mAP=0.416))
    ExpectedMetricsHook(tolerance=0.0021).after_calibrate(SimpleNamespace(quantize_loop=loop))
    assert bool(notes) == noted
    if noted:
        assert 'bbox_mAP' in notes[0] and '0.460' in notes[0] and f'{measured:.3f}' in notes[0]


def test_expected_metrics_without_expectation():
    loop = SimpleNamespace(metrics={}, expected=None, note=pytest.fail)
    ExpectedMetricsHook().after_calibrate(SimpleNamespace(quantize_loop=loop))


def test_expected_metrics_reach_the_report(tiny_run, tmp_path):
    """A wrong expectation becomes a note of the report, and does not stop the run."""


    options = (*tiny_run.options, *demo_runs.QUICK, 'quantize_cfg.evaluate.float=True',
               'quantize_cfg.expected.bbox_mAP=0.9')
    args = demo_runs.arguments(demo_runs.W4A4, tiny_run.checkpoint, tmp_path, options)
    assert quant_main(args) == 0
    notes = json.loads((tmp_path / 'report.json').read_text())['notes']
    assert any('the config expects 0.900' in note for note in notes)
