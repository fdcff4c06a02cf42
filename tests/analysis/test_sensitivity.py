"""Sensitivity: one layer at a time, ranked, and a suggestion that a config takes."""
import copy
import json

import pytest
import torch
from demo_runs import QUICK, W4A4, arguments
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from tiny_models import calibrated

from pfcr_mm.analysis.cli import sensitivity_main
from pfcr_mm.analysis.propagation import common_boxes
from pfcr_mm.analysis.sensitivity import (
    Entry,
    groups_of,
    outputs,
    quantized_only,
    relative_error,
    sensitivity,
    suggestion,
)
from pfcr_mm.cli import quant_main
from pfcr_mm.models import QuantConfig
from pfcr_mm.modules import QuantLayer, QuantMatmul, set_quantization

WEAK = 'backbone.stages.0.blocks.0.ffn.layers.1'


@pytest.fixture(scope='module')
def pair(build_quantized, images):
    """(float twin, model at 8 bits but for one layer at 2)."""
    model = calibrated(build_quantized(
        weight_bits=8, activation_bits=8,
        overrides=[dict(pattern=WEAK, weight_bits=2, activation_bits=2)]), images)
    twin = copy.deepcopy(model)
    set_quantization(twin, False, False)
    return twin, model


def test_relative_error_by_hand():
    reference = {('neck', 0): {0: torch.tensor([3.0, 4.0])}, ('rpn_head', 0): {0: torch.ones(4)},
                 ('backbone', 0): {0: torch.ones(1)}}
    values = {('neck', 0): {0: torch.tensor([3.0, 3.0])},
              ('rpn_head', 0): {0: torch.tensor([1.0, 1.0, 0.0, 0.0])},
              ('backbone', 0): {0: torch.zeros(1)}}
    assert relative_error(reference, values) == pytest.approx((1 / 25 + 2 / 4) / 2)


def test_every_layer_is_in_one_group(pair):
    _, model = pair
    names = {n for n, m in model.named_modules() if isinstance(m, (QuantLayer, QuantMatmul))}
    assert set(groups_of(model, 'layer')) == names
    leaves = groups_of(model, 'leaf')
    assert sorted(n for found in leaves.values() for n in found if n.startswith('backbone')) == \
        sorted(n for n in names if n.startswith('backbone'))
    assert WEAK in leaves['backbone.stages.0.blocks.0.ffn']


def test_the_weak_layer_ranks_first(pair, images):
    twin, model = pair
    before = {n: id(m) for n, m in twin.named_modules()}
    entries = sensitivity(twin, model, images[:1], 'leaf')
    assert WEAK in entries[0].layers and entries[0].error > 2 * entries[1].error
    assert {n: id(m) for n, m in twin.named_modules()} == before
    text = suggestion(entries[:1] + entries[-1:], 'a.py', bits=6)
    scope = {}
    exec(text, scope)
    quant = QuantConfig.from_dict(scope['model']['quant'])
    assert quant.bits_for(WEAK, False) == (6, 6)
    exclude = eval(text.split('# model = ')[1].splitlines()[0])['quant']['exclude']
    assert QuantConfig.from_dict(dict(exclude=exclude)).skip_reason(WEAK)


def test_a_suggestion_by_ap():
    """5 points lost in all: b alone makes 3. Where nothing lost AP, error decides."""
    entries = [Entry('a', ['a'], 9.0, None, None, -0.01), Entry('b', ['b1', 'b2'], 0.1, None, None,
               0.03), Entry('c', ['c'], 0.2, None, None, 0.02)]
    text = suggestion(entries, 'a.py')
    assert '2 layers that make 60% of the AP lost' in text
    assert "'b1'" in text and "'b2'" in text and "'a'" not in text and "'c'" not in text
    for entry in entries:
        entry.lost = 0.0
    assert '1 layers that make 97% of the error' in suggestion(entries, 'a.py')


def test_modules_come_back_after_an_error(pair):
    twin, model = pair
    own = twin.get_submodule(WEAK)
    with pytest.raises(KeyError), quantized_only(twin, model, [WEAK]):
        assert twin.get_submodule(WEAK) is model.get_submodule(WEAK)
        raise KeyError
    assert twin.get_submodule(WEAK) is own


def test_all_layers_together_are_the_quantized_model(pair, images):
    twin, model = pair
    boxes = common_boxes(twin, images[:1])
    with quantized_only(twin, model, list(groups_of(model, 'layer'))):
        mixed = outputs(twin, images[:1], boxes)
    assert relative_error(outputs(model, images[:1], boxes), mixed) == 0


def test_the_tool(tiny_run, tmp_path, monkeypatch):
    """By AP on a subset, stages; and its suggestion in a config."""
    measured, process = [], Evaluator.process
    monkeypatch.setattr(Evaluator, 'process', lambda self, data_samples, **more: (
        measured.extend(data_samples), process(self, data_samples=data_samples, **more)))
    options = (*tiny_run.options, *QUICK)
    args = arguments(W4A4, tiny_run.checkpoint, tmp_path, options)
    assert sensitivity_main([*args[:2], '--level', 'stage', '--by', 'ap', '--images', '3',
                             *args[2:]]) == 0
    assert len(measured) == 3 * (1 + 4)  # the float model, each stage
    found = json.loads((tmp_path / 'sensitivity.json').read_text())
    assert {e['name'] for e in found['entries']} == {
        f'backbone.stages.{i}' for i in range(4)}
    assert all(0 <= e['metrics']['bbox_mAP'] <= 1 and e['error'] > 0 for e in found['entries'])
    lost = [e['lost'] for e in found['entries']]
    assert lost == sorted(lost, reverse=True)
    assert (tmp_path / 'sensitivity.png').read_bytes()[:4] == b'\x89PNG'
    suggested = tmp_path / 'sensitivity_overrides.py'
    quant = Config.fromfile(suggested).model.quant
    assert quant.overrides[0].pattern.startswith('backbone.stages.')
    assert quant.weight_bits == 4  # the rest is that of the config
    assert quant_main([*arguments(suggested, tiny_run.checkpoint, tmp_path, options),
                       '--dry-run']) == 0


def test_a_suggestion_keeps_what_the_config_has():
    own = dict(exclude=['neck*'], overrides=[dict(pattern='rpn*', weight_bits=6)])
    text = suggestion([Entry('a', ['a'], 1.0, 0.0)], '../a.py', own)
    assert "exclude=['neck*', 'a']" in text and "_base_ = '../a.py'" in text
    scope = {}
    exec(text, scope)
    assert [o['pattern'] for o in scope['model']['quant']['overrides']] == ['rpn*', 'a']


@pytest.mark.parametrize('more, word', [
    (('--level', 'nothing'), "--level 'nothing'"), (('--images', '0'), '--images 0'),
    (('--bits', '9'), '--bits 9')])
def test_bad_arguments(more, word, tiny_run, tmp_path, capsys):
    args = arguments(W4A4, tiny_run.checkpoint, tmp_path, tiny_run.options)
    assert sensitivity_main([*args[:2], *more, *args[2:]]) == 2
    line, = [x for x in capsys.readouterr().err.splitlines() if 'error: ' in x]
    assert word in line
