"""What the benchmark writes."""
import json

import demo_runs
import pytest
from demo_runs import load_tool

from pfcr_mm.benchmark import whole_runs
from pfcr_mm.benchmark.timing import Stopwatch
from pfcr_mm.errors import UsageError


def test_a_short_run(tmp_path):
    out = tmp_path / 'out.json'
    arguments = ['--out', out, '--kinds', 'vit_block', '--pairs', 4, '--images']
    assert load_tool('benchmark').main([str(a) for a in arguments]) == 0
    found = json.loads(out.read_text())
    for key in ('iteration_ratio', 'speedup_over_reference', 'inference_ratio'):
        assert list(found[key]) == ['vit_block'] and found[key]['vit_block'] > 0
    assert found['files']['size_mb'] > 1
    assert 'peak_memory_mb' not in found


def test_whole_runs(tmp_path):
    """Each in a process of its own, all images on disk in one of them."""
    float_weights = demo_runs.save_tiny(tmp_path / 'float.pth')
    options = [*demo_runs.TINY, *demo_runs.QUICK, f'load_from={float_weights}',
               'quantize_cfg.parts=[neck]', 'quantize_cfg.total_iters=20']
    found = whole_runs.measure_runs([6], options)
    for kept in ('memory', 'disk'):
        assert found['peak_memory_mb'][kept]['6'] > 200  # torch alone takes that
        seconds = found['seconds'][kept]['6']
        assert {'calibrate', 'stage 1', 'evaluate quantized', 'total', 'cpu'} == set(seconds)
        assert all(value > 0 for value in seconds.values())
        phases = sum(seconds.values()) - seconds['total'] - seconds['cpu']
        assert phases <= seconds['total']


def test_both_halves(tmp_path, monkeypatch, capsys):
    """Options are those of the whole runs; a run that fails leaves what was measured before."""
    tool = load_tool('benchmark')
    out, seen = tmp_path / 'out.json', []

    def runs(images, options):
        seen.append((images, options))
        raise UsageError('the run 6-memory has failed')

    monkeypatch.setattr(tool, 'measure_runs', runs)
    assert tool.main(['--out', str(out), '--kinds', 'swin_block', '--pairs', '2', '--images', '6',
                      '--cfg-options', 'quantize_cfg.parts=[neck]']) == 2
    assert seen == [([6], ['quantize_cfg.parts=[neck]'])]
    assert json.loads(out.read_text())['iteration_ratio']['swin_block'] > 0
    assert '6-memory has failed' in capsys.readouterr().err


def test_a_run_that_fails_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="6-memory has failed: .*levels has 'window'"):
        whole_runs.measure_runs([6], ['quantize_cfg.levels=[window]'])


def test_a_wrong_number_is_one_line(tmp_path, capsys):
    tool = load_tool('benchmark')
    assert tool.main(['--out', str(tmp_path / 'o.json'), '--kinds', '--images', '0']) == 2
    assert '--images 0' in capsys.readouterr().err


def test_ratios_are_of_pairs():
    watch = Stopwatch()
    for a, b in ((9, 1), (2, 1), (4, 2), (30, 10)):
        watch.note('a', a)
        watch.note('b', b)
    assert watch.ratio('a', 'b', skip=1) == pytest.approx(2)
    assert watch.median('a', skip=1) == 4
