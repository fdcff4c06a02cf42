"""tools/run_matrix.py: what is done stays, what fails does not stop the rest."""
import csv
import json

import demo_runs
import pytest
from demo_runs import REPO, W4A4, load_tool
from mmengine.config import Config

from pfcr_mm.cli import quant_config
from pfcr_mm.engine.fingerprint import fingerprint

W3A3 = W4A4.with_name('pfcr_maskrcnn_swin_demo_w3a3.py')
HEADER = ('config,weight_bits,activation_bits,seed,iterations,float_bbox_mAP,float_segm_mAP,'
          'calibrated_bbox_mAP,calibrated_segm_mAP,quantized_bbox_mAP,quantized_segm_mAP,seconds')


@pytest.fixture(scope='module')
def matrix():
    return load_tool('run_matrix')


@pytest.fixture()
def bench(matrix, tmp_path, monkeypatch):
    """bench(*arguments): (exit code, CSV rows, runs made); a run writes a made-up report."""
    made = []
    bench_out = tmp_path / 'out.csv'

    def run(arguments, folder):
        cfg = quant_config(arguments)
        made.append((folder.name, cfg.model.quant.weight_bits))
        if cfg.model.quant.activation_bits == 3:
            raise RuntimeError('quant.py: error: no memory')
        seed = cfg.randomness.seed
        folder.mkdir(parents=True, exist_ok=True)
        ap = dict(bbox_mAP=0.5, segm_mAP=0.4)
        (folder / 'report.json').write_text(json.dumps(dict(
            bits=dict(weight=cfg.model.quant.weight_bits, activation=4), seed=seed,
            config=fingerprint(cfg), units=[dict(iters=3), dict(iters=4)], float=ap,
            calibrated=None, quantized=dict(bbox_mAP=0.45 + seed / 100, segm_mAP=0.36),
            seconds=1.6)))

    def call(*arguments):
        made.clear()
        code = matrix.main([*map(str, arguments), '--out', str(bench_out), '--work-dir',
                               str(tmp_path / 'runs')])
        return code, list(csv.DictReader(bench_out.open())) if bench_out.exists() else [], [*made]

    monkeypatch.setattr(matrix, 'run', run)
    call.out = bench_out
    call.runs = tmp_path / 'runs'
    return call


def test_rows_and_columns(bench, capsys):
    code, rows, made = bench(W4A4, '--seeds', 0, 1)
    assert code == 0 and len(made) == 2
    assert bench.out.read_text().splitlines()[0] == HEADER
    assert [r['seed'] for r in rows] == ['0', '1']
    assert rows[1] == dict(zip(HEADER.split(','), (
        W4A4.stem, '4', '4', '1', '7', '0.5', '0.4', '', '', '0.46', '0.36', '2')))
    printed = capsys.readouterr().out
    assert f'| {W4A4.stem} | W4A4 | 2 | float | 50.0 | 40.0 |' in printed
    assert '| quantized | 45.5 [45.0..46.0] (91.0%) | 36.0 (90.0%) |' in printed
    assert 'calibrated only' not in printed  # not measured, so not shown


def test_long_rows(bench, matrix):
    _, rows, _ = bench(W4A4, '--seeds', 0, 1, '--long')
    assert list(rows[0]) == ['config', 'bits', 'method', 'seed', 'split', 'bbox_mAP', 'segm_mAP']
    assert [(r['method'], r['seed'], r['bbox_mAP']) for r in rows] == [
        ('float', '0', '0.5'), ('quantized', '0', '0.45'),
        ('float', '1', '0.5'), ('quantized', '1', '0.46')]
    assert {(r['bits'], r['split']) for r in rows} == {('w4a4', 'test')}
    # another config beside it, and a run that is not repeated
    other = W4A4.with_name('pfcr_maskrcnn_swin_demo_w2a4.py')
    _, rows, made = bench(other, W4A4, '--seeds', 0, '--long')
    assert [name for name, _ in made] == [f'{other.stem}_seed0'] and len(rows) == 2 + 2 + 2


def test_long_rows_of_two_splits(matrix):
    ap = dict(bbox_mAP=0.5, segm_mAP=0.4)
    report = dict(
        bits=dict(weight=3, activation=4), seed=2, method='PFCR', units=[1], float=ap,
        calibrated=None, quantized=ap, val=dict(float=dict(bbox_mAP=0.1), quantized=ap))
    found = [tuple(r.values()) for r in matrix.long_rows('mine', report)]
    assert found == [
        ('mine', 'w3a4', 'float', 2, 'test', 0.5, 0.4),
        ('mine', 'w3a4', 'PFCR', 2, 'test', 0.5, 0.4),
        ('mine', 'w3a4', 'float', 2, 'val', 0.1, None),
        ('mine', 'w3a4', 'PFCR', 2, 'val', 0.5, 0.4)]


def test_columns_are_those_of_the_results_in_the_repository():
    assert (REPO / 'results' / 'demo_1000.csv').read_text().splitlines()[0] == HEADER


def test_what_is_done_is_not_repeated(bench):
    bench(W4A4, '--seeds', 0)
    code, rows, made = bench(W4A4, '--seeds', 0, 1)
    assert code == 0 and len(rows) == 2
    assert [name for name, _ in made] == [f'{W4A4.stem}_seed1']


@pytest.mark.parametrize('option', [
    'model.quant.weight_bits=5', 'quantize_cfg.traversal=level_order', 'load_from=other.pth'])
def test_a_changed_config_is_run_again(bench, option):
    bench(W4A4, '--seeds', 0)
    assert bench(W4A4, '--seeds', 0, '--cfg-options', option)[2] != []
    assert bench(W4A4, '--seeds', 0, '--cfg-options', option)[2] == []


@pytest.mark.parametrize('content', ['', '{"seed": 0', '{"seed": 0, "units": []}'],
                         ids=['empty', 'cut off', 'without fingerprint'])
def test_another_report_does_not_count(bench, content):
    folder = bench.runs / f'{W4A4.stem}_seed0'
    folder.mkdir(parents=True)
    (folder / 'report.json').write_text(content)
    assert len(bench(W4A4, '--seeds', 0)[2]) == 1


def test_a_failure_is_one_line_and_the_rest_goes_on(bench, capsys):
    code, rows, made = bench('nobody.py', W3A3, W4A4, '--seeds', 0)
    assert code == 1 and len(made) == 2
    assert [r['config'] for r in rows] == [W4A4.stem]
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert errors == [
        'run_matrix: nobody seed 0: failed: config nobody.py is not there; see configs/',
        f'run_matrix: {W3A3.stem} seed 0: failed: quant.py: error: no memory',
        'run_matrix: 2 of 3 runs failed']


def test_rows_of_other_configs_stay(bench):
    other = W4A4.with_name('pfcr_maskrcnn_swin_demo_w2a4.py')
    bench(other, '--seeds', 0)
    _, rows, _ = bench(W4A4, '--seeds', 0)
    assert [r['config'] for r in rows] == [other.stem, W4A4.stem]
    _, rows, _ = bench(W4A4, '--seeds', 0)
    assert len(rows) == 2


def test_no_run_only_collects(bench, capsys):
    bench(W4A4, '--seeds', 1)
    code, rows, made = bench(W4A4, '--seeds', 0, 1, '--no-run')
    assert code == 0 and made == [] and [r['seed'] for r in rows] == ['1']
    assert 'seed 0: not done' in capsys.readouterr().out


@pytest.mark.parametrize('script, message', [
    ("raise TypeError('no such key')", 'TypeError: no such key'),
    ("import sys; sys.exit('quant.py: error: no checkpoint')", 'quant.py: error: no checkpoint'),
    ('import os; os.kill(os.getpid(), 9)', r'killed by signal 9 \(out of memory\?\)'),
    ('import os; os._exit(3)', 'exit code 3'),
], ids=['crash', 'refused', 'killed', 'silent'])
def test_how_a_process_ends(script, message, matrix, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, 'QUANT', tmp_path / 'quant.py')
    matrix.QUANT.write_text(script)
    with pytest.raises(RuntimeError, match=message):
        matrix.run(['mine.py'], tmp_path / 'run')
    assert (tmp_path / 'run' / 'stderr.txt').exists()


@pytest.mark.parametrize('unfinished, refuses, calls', [
    (False, False, ['new']), (True, False, ['resume']), (True, True, ['resume', 'new'])],
    ids=['new', 'cut short', 'of another config'])
def test_a_run_that_was_cut_short_goes_on(
        unfinished, refuses, calls, matrix, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, 'QUANT', tmp_path / 'quant.py')
    log = tmp_path / 'log'
    matrix.QUANT.write_text(
        f"import sys\nhow = 'resume' if '--resume' in sys.argv else 'new'\n"
        f"open({str(log)!r}, 'a').write(how + '\\n')\n"
        f"sys.exit(2 if {refuses} and how == 'resume' else 0)\n")
    if unfinished:
        (tmp_path / 'run' / 'resume').mkdir(parents=True)
        (tmp_path / 'run' / 'resume' / '000001.pth').write_bytes(b'')
    matrix.run(['mine.py'], tmp_path / 'run')
    assert log.read_text().split() == calls


def test_a_real_run(matrix, tiny_run, tiny_options, tmp_path):
    config, out = tmp_path / 'mine.py', tmp_path / 'out.csv'
    config.write_text(f"_base_ = '{W4A4}'\nload_from = '{tiny_run.checkpoint}'\n")
    arguments = [str(config), '--seeds', '0', '--out', str(out), '--work-dir',
                 str(tmp_path / 'runs'), '--cfg-options', *tiny_options]
    assert matrix.main(arguments) == 0
    row, = csv.DictReader(out.open())
    report = json.loads((tmp_path / 'runs' / 'mine_seed0' / 'report.json').read_text())
    assert float(row['quantized_bbox_mAP']) == report['quantized']['bbox_mAP']
    assert int(row['iterations']) == sum(u['iters'] for u in report['units'])
    written = out.read_text()
    assert matrix.main([*arguments[:1], '--no-run', *arguments[1:]]) == 0
    assert out.read_text() == written  # done: its report is taken as it is


# --- fingerprint ------------------------------------------------------------

def test_fingerprint_of_a_run_is_that_of_its_config(tiny_run):
    arguments = demo_runs.arguments(W4A4, tiny_run.checkpoint, 'elsewhere', tiny_run.options)
    assert tiny_run.report['config'] == fingerprint(quant_config(arguments))


def test_fingerprint_looks_at_what_is_run_only():
    def changed(key, value):
        cfg = Config.fromfile(W4A4)
        cfg.merge_from_dict({key: value})
        return fingerprint(cfg)

    same = fingerprint(Config.fromfile(W4A4))
    assert changed('work_dir', 'x') == changed('log_level', 'DEBUG') == same
    assert len({same, changed('randomness.seed', 5), changed('load_from', 'x'),
                changed('quantize_cfg.reconstruction.iters', 9),
                changed('model.quant.weight_bits', 5)}) == 5
