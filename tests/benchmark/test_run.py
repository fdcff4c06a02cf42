"""What the benchmark writes."""
import json

import pytest
from demo_runs import load_tool

from pfcr_mm.benchmark.timing import Stopwatch


def test_a_short_run(tmp_path):
    report = tmp_path / 'report.json'
    report.write_text(json.dumps(dict(
        calibration=dict(images=64), peak_memory_mb=700.04,
        phases=dict(calibrate=dict(seconds=3.004, peak_memory_mb=1)))))
    out = tmp_path / 'out.json'
    arguments = ['--out', out, '--kinds', 'vit_block', '--pairs', 4, '--reports', report]
    assert load_tool('benchmark').main([str(a) for a in arguments]) == 0
    found = json.loads(out.read_text())
    for key in ('iteration_ratio', 'speedup_over_reference', 'inference_ratio'):
        assert list(found[key]) == ['vit_block'] and found[key]['vit_block'] > 0
    assert found['peak_memory_mb'] == {'64': 700.0}
    assert found['seconds'] == {'64': {'calibrate': 3.0}}
    assert found['files']['size_mb'] > 1


def test_a_missing_report_is_one_line(tmp_path, capsys, monkeypatch):
    tool = load_tool('benchmark')
    monkeypatch.setattr(tool, 'run_benchmark', lambda *a: tool_reports(a[-1]))
    assert tool.main(['--out', str(tmp_path / 'o.json'), '--reports', 'none.json']) == 2
    assert 'none.json cannot be read' in capsys.readouterr().err


def tool_reports(paths):
    from pfcr_mm.benchmark.run import from_reports
    return from_reports(paths)


def test_ratios_are_of_pairs():
    watch = Stopwatch()
    for a, b in ((9, 1), (2, 1), (4, 2), (30, 10)):
        watch.note('a', a)
        watch.note('b', b)
    assert watch.ratio('a', 'b', skip=1) == pytest.approx(2)
    assert watch.median('a', skip=1) == 4
