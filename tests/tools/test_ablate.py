"""tools/ablate.py: the grid, equal iterations, what is done stays, a table and a plot."""
import csv
import json

import pytest
from demo_runs import REPO, load_tool
from matplotlib.axes import Axes

from pfcr_mm.cli import quant_config
from pfcr_mm.engine.fingerprint import fingerprint
from pfcr_mm.models import QuantConfig

VIT = REPO / 'configs' / 'classification' / 'pfcr_vit_ti_w3a3.py'
DEMO = REPO / 'configs' / 'demo' / 'pfcr_maskrcnn_swin_demo_w3a3.py'


@pytest.fixture()
def ablate(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / 'tools'))
    return load_tool('ablate')


@pytest.fixture()
def grid(ablate, tmp_path, monkeypatch):
    """grid(*arguments): (exit code, CSV rows, configs run); a run writes a made-up report."""
    made = []

    def run(arguments, folder):
        cfg = quant_config(arguments)
        made.append(cfg)
        if cfg.model.quant.get('rounding') == 'adaround':
            raise RuntimeError('quant.py: error: no memory')
        seed = cfg.randomness.seed
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'report.json').write_text(json.dumps(dict(
            bits=dict(weight=3, activation=3), seed=seed, config=fingerprint(cfg),
            units=[dict(iters=3), dict(iters=4)], float=dict(top1=0.8, top5=0.9), calibrated=None,
            quantized=dict(top1=0.6 + seed / 100, top5=0.8), seconds=1.6,
            metrics=dict(quantized={'imagenet/kl': 0.5, 'imagenet/same': 0.75}))))

    def call(*arguments, config=VIT):
        made.clear()
        out = tmp_path / 'out.csv'
        code = ablate.main([str(config), *map(str, arguments), '--out', str(out),
                            '--work-dir', str(call.work_dir)])
        return code, list(csv.DictReader(out.open())) if out.exists() else [], [*made]

    monkeypatch.setitem(ablate.report_of.__globals__, 'run', run)
    call.folder, call.work_dir = tmp_path, tmp_path / 'runs'
    return call


def test_a_product_of_axes(grid, capsys):
    code, rows, made = grid('--grid', 'units=leaf,leaf..block*pos=off,quantizer', '--seeds', 0,
                            '--total-iters', 900)
    assert code == 0 and len(rows) == len(made) == 4
    assert {(r['units'], r['pos']) for r in rows} == {
        ('leaf', 'off'), ('leaf', 'quantizer'), ('leaf..block', 'off'),
        ('leaf..block', 'quantizer')}
    assert {tuple(cfg.quantize_cfg.levels) for cfg in made} == {('leaf', ), ('leaf', 'block')}
    assert {cfg.quantize_cfg.total_iters for cfg in made} == {900}
    printed = capsys.readouterr().out
    assert '| units | pos | seeds | iterations | top1 | of float |' in printed
    assert '| leaf | off | 1 | 7 | 60.0 | 75.0% |' in printed
    assert (grid.folder / 'out.png').stat().st_size > 1000


def test_columns(grid):
    _, rows, _ = grid('--grid', 'bits=w4a4,w3a3', '--seeds', 1)
    assert list(rows[0]) == [
        'config', 'method', 'bits', 'units', 'pos', 'loss', 'rounding', 'softmax', 'gelu',
        'values', 'heads', 'means', 'queries', 'tokens', 'padding', 'zero_point', 'traversal',
        'seed', 'top1', 'top5', 'float_top1', 'float_top5', 'calibrated_top1', 'calibrated_top5',
        'kl', 'same', 'iterations', 'seconds']
    assert (rows[0]['kl'], rows[0]['same']) == ('0.5', '0.75')
    assert [r['bits'] for r in rows] == ['w4a4', 'w3a3']
    assert (rows[0]['top1'], rows[0]['float_top1'], rows[0]['calibrated_top1']) == (
        '0.61', '0.8', '')
    assert (rows[0]['units'], rows[0]['values'], rows[0]['padding']) == (
        'leaf..backbone', 'balanced', 'moved')


def test_words_share_the_cell_in_which_nothing_varies(grid):
    code, rows, made = grid('--grid', 'loss', 'softmax', 'zero_point', '--seeds', 0)
    assert code == 0 and len(made) == len(rows) == 5 + 4 + 2 - 2
    assert len({tuple(r.values()) for r in rows}) == len(rows)


def test_what_is_left_to_the_code_depends_on_bits(grid):
    """Softmax is on log2 up to 4 bits, then on AdaLog's grid."""
    code, rows, made = grid('--grid', 'bits=w6a6,w3a3*softmax=log2,adalog', '--seeds', 0)
    assert code == 0 and len(made) == 4
    assert {(r['bits'], r['softmax']) for r in rows} == {
        ('w6a6', 'log2'), ('w6a6', 'adalog'), ('w3a3', 'log2'), ('w3a3', 'adalog')}
    for row, cfg in zip(rows, made):
        assert QuantConfig.from_dict(cfg.model.quant).softmax['kind'] == row['softmax']


def test_methods(grid):
    code, rows, made = grid('--grid', 'method=pfcr,calibrate', '--seeds', 0, 1)
    assert code == 0 and [(r['method'], r['seed']) for r in rows] == [
        ('pfcr', '0'), ('pfcr', '1'), ('calibrate', '0'), ('calibrate', '1')]
    assert [list(cfg.quantize_cfg.levels) for cfg in made[2:]] == [[], []]
    assert rows[2]['units'] == 'none' and rows[2]['pos'] == 'off'


def test_a_work_dir_with_blanks_and_commas(grid):
    grid.work_dir = grid.folder / 'runs, all of them'
    code, _, made = grid('--grid', 'loss=mse', '--seeds', 0)
    assert code == 0
    assert made[0].quantize_cfg.calibration_dir == str(grid.work_dir / 'calibrations')


def test_what_is_done_is_not_repeated(grid):
    grid('--grid', 'loss=mse,aph', '--seeds', 0)
    code, rows, made = grid('--grid', 'loss=mse,mse_final', '--seeds', 0)
    assert code == 0 and [cfg.quantize_cfg.reconstruction.loss for cfg in made] == ['mse_final']
    assert {r['loss'] for r in rows} == {'mse', 'aph', 'mse_final'}
    assert grid('--grid', 'loss', '--seeds', 0, '--no-run')[2] == []
    assert len(grid('--grid', 'loss=mse', '--seeds', 0, '--total-iters', 5000)[2]) == 1


def test_rows_of_other_iterations_stay(grid, capsys):
    out = grid.folder / 'out.csv'
    grid('--grid', 'loss=mse', '--seeds', 0)
    earlier = out.read_text()
    out.write_text(earlier.replace(',7,', ',900,').replace('0.6,', '0.7,'))
    _, rows, _ = grid('--grid', 'loss=mse', '--seeds', 0, '--no-run')
    assert [(r['iterations'], r['top1']) for r in rows] == [('900', '0.7'), ('7', '0.6')]
    printed = capsys.readouterr().out
    assert '| 1 | 900 | 70.0 |' in printed and '| 1 | 7 | 60.0 |' in printed
    assert len(grid('--grid', 'loss=mse', '--seeds', 0, '--no-run')[1]) == 2  # none is added


def test_the_plot_is_in_percent(grid, monkeypatch):
    drawn, points = [], []
    line, bars = Axes.axvline, Axes.errorbar
    monkeypatch.setattr(Axes, 'axvline', lambda self, x, **more: (
        drawn.append(x), line(self, x, **more))[1])
    monkeypatch.setattr(Axes, 'errorbar', lambda self, x, y, **more: (
        points.append((x, more['xerr'])), bars(self, x, y, **more))[1])
    grid('--grid', 'loss=mse', '--seeds', 0, 2)
    assert drawn == [pytest.approx(80)]
    (means, (below, above)), = points
    assert means == pytest.approx([61]) and below == above == (pytest.approx([1]))


def test_a_failure_does_not_stop_the_rest(grid, capsys):
    code, rows, _ = grid('--grid', 'rounding', '--seeds', 0)
    assert code == 1 and [r['rounding'] for r in rows] == ['latent']
    assert 'rounding-adaround seed 0: failed: quant.py: error: no memory' in capsys.readouterr().err


def test_the_default_grid_of_a_detector(grid, capsys):
    assert grid('--list', '--seeds', 0, config=DEMO)[0] == 0
    lines = capsys.readouterr().out.splitlines()
    # units x POS, and each other axis around the config
    assert len(lines) == len(set(lines)) == 6 * 4 + 4 + 1 + 3 + 1 + 1 + 1 + 1 + 1 + 1
    assert 'units-leaf..pair_pos-unit seed 0' in lines and 'padding-zero seed 0' in lines
    assert {'values-plain seed 0', 'heads-plain seed 0', 'means-plain seed 0'} <= set(lines)
    assert 'base seed 0' in lines


@pytest.mark.parametrize('word, message', [
    ('size', "'size' is no axis"), ('pos=twice', "pos has no value 'twice'"),
    ('units*sizes', "'sizes' is no axis")])
def test_bad_grid(word, message, grid, capsys):
    assert grid('--grid', word)[0] == 2
    assert message in capsys.readouterr().err
