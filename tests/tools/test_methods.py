"""Every method is a config of the same engine."""
import json

import demo_runs
import pytest
import torch
from demo_runs import REPO
from mmengine.config import Config
from mmengine.logging import MMLogger
from tiny_classifiers import build_classifier, float_state, write_folder

from pfcr_mm.cli import build_runner, quant_config, quant_main

from .test_classifier_run import W4A4, options, refused

METHODS = sorted((REPO / 'configs' / '_base_' / 'methods').glob('*.py'))
NAMES = [path.stem for path in METHODS]
SKIP_EVALUATION = ('quantize_cfg.evaluate.float=False', 'quantize_cfg.evaluate.calibrated=False')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A folder with images and a float checkpoint."""
    base = tmp_path_factory.mktemp('methods')
    write_folder(base / 'images')
    torch.save(float_state(build_classifier('vit')), base / 'float.pth')
    return base


def arguments(base, method, folder, *more, config=W4A4):
    path = REPO / 'configs' / '_base_' / 'methods' / f'{method}.py'
    return [*demo_runs.arguments(
        config, base / 'float.pth', folder, (*options(base / 'images'), *more)),
        '--method', str(path)]


def planned(base, method, folder, *more, config=W4A4):
    """(loop, all units with their stage) that a method plans."""
    MMLogger._instance_dict.clear()
    cfg = quant_config(arguments(base, method, folder, *more, config=config))
    cfg.visualizer = dict(type='Visualizer', name=str(folder))
    loop = build_runner(cfg).build_quantize_loop()
    loop.rehearse()
    return loop, [(n, unit) for (n, _), units in loop.plan().items() for unit in units]


def test_all_of_them_are_there():
    assert set(NAMES) == {
        'adaquant', 'brecq', 'calibrate', 'ias_vit', 'mgrq', 'pfcr', 'pfcr_no_pos', 'pfcr_plus',
        'pfcr_pos_r2', 'pfcr_pos_r3', 'qdrop', 'repq'}


@pytest.mark.parametrize('method', NAMES)
def test_a_method_says_nothing_of_bits_or_data(method):
    cfg = Config.fromfile(REPO / 'configs' / '_base_' / 'methods' / f'{method}.py').to_dict()
    assert cfg['method'] and set(cfg) <= {'model', 'quantize_cfg', 'method'}
    assert set(cfg.get('model', {})) <= {'quant'}
    assert not {'weight_bits', 'activation_bits'} & set(cfg.get('model', {}).get('quant', {}))


@pytest.mark.parametrize('method', NAMES)
def test_plan_at_equal_iterations(method, base, tmp_path):
    loop, units = planned(base, method, tmp_path, 'quantize_cfg.total_iters=300')
    iters = [loop.unit_config(*unit).iters for unit in units]
    if method in ('calibrate', 'repq'):
        assert units == []
        return
    assert sum(iters) == 300 and min(iters) >= 1
    levels = {unit.level for _, unit in units}
    if method == 'adaquant':
        assert levels == {'layer'} and len(units) == 1 + 4 * 6 + 1
    elif not method.startswith('pfcr'):
        assert levels == {'leaf', 'block'}  # leaves outside of blocks
    else:
        assert levels == {'leaf', 'block', 'pair', 'quad', 'backbone'}
    assert {number for number, _ in units} == (
        {1} if method in ('adaquant', 'mgrq', 'pfcr_no_pos', 'qdrop') else {1, 2})


@pytest.mark.parametrize('method', ['adaquant', 'brecq', 'ias_vit', 'mgrq', 'pfcr_plus'])
def test_a_method_with_something_of_its_own_runs(method, base, tmp_path):
    assert quant_main(arguments(base, method, tmp_path, *SKIP_EVALUATION)) == 0
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['method'] == Config.fromfile(METHODS[NAMES.index(method)]).method
    assert report['units'] and set(report['quantized']) == {'top1', 'top5'}
    assert all(unit['loss_after'] is not None for unit in report['units'])
    assert report['notes'] == []


@pytest.mark.parametrize('method, mixes, keeps', [
    ('adaquant', [1], 1), ('brecq', [1, 1], 1), ('ias_vit', [0, 1], 1), ('mgrq', [0.5], 1),
    ('qdrop', [0.5], 0.5)])
def test_a_method_brings_its_own_inputs(method, mixes, keeps, base, tmp_path):
    """Whatever the config is it is laid over."""
    for own in (0.25, 1.0):
        config = tmp_path / f'own_{own}.py'
        config.write_text(f"_base_ = '{W4A4}'\nquantize_cfg = dict(reconstruction=dict("
                          f'input_mix={own}, keep_prob={own}))\n')
        loop, units = planned(base, method, tmp_path / config.stem, config=config)
        configs = [(n, loop.unit_config(n, unit)) for n, unit in units if unit.chain == 'backbone']
        for stage, mix in enumerate(mixes, 1):
            assert {c.input_mix for n, c in configs if n == stage} == {mix}
        assert {c.keep_prob for _, c in configs} == {keeps}


def test_brecq_does_not_fit_weights_to_quantized_inputs(base, tmp_path):
    loop, _ = planned(base, 'brecq', tmp_path)
    assert loop.calibration['compensate'] is None and not loop.calibration['feed_back']


def test_stages_of_brecq(base, tmp_path):
    loop, units = planned(base, 'brecq', tmp_path)
    first, second = (loop.unit_config(n, next(u for m, u in units if m == n)) for n in (1, 2))
    assert loop.stages[1].quantize_activations is False and first.bias_lr == 0
    assert loop.stages[2].learns == 'fixed' and second.iters == max(1, round(first.iters / 4))


@pytest.mark.parametrize('option, word', [
    ('quantize_cfg.total_iters=0', 'quantize_cfg.total_iters=0'),
    ('quantize_cfg.total_iters=3', 'total_iters=3 is less than one iteration'),
    ('quantize_cfg.reconstruction.loss=hinge', "loss='hinge'"),
])
def test_bad_input(option, word, base, tmp_path, capsys):
    refused(arguments(base, 'pfcr', tmp_path, option), capsys, word)


def test_no_such_method(base, tmp_path, capsys):
    refused(arguments(base, 'nobody', tmp_path), capsys, 'nobody.py is not there')
