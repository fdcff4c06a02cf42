"""report.html of a run, and tools/report.py on what a run has left."""
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from demo_runs import W4A4
from mmengine.config import Config
from pages import Page

from pfcr_mm.analysis import DiagnosticsHook
from pfcr_mm.analysis.cli import report_main
from pfcr_mm.engine.resume import FIGURES

TITLES = ('Result', 'Reconstruction', 'Error propagation', 'Attention', 'Activations', 'Weights',
          'Detections', 'Every layer')


def report_of(folder):
    return json.loads((folder / 'report.json').read_text())


def copy_of(run, folder, *names):
    folder.mkdir()
    for name in names:
        shutil.copy(run.folder / name, folder / name)
    return folder / 'quantized.pth'


def make(run, checkpoint, *more):
    """tools/report.py on the config that a run has written. Returns the exit code."""
    return report_main([str(run.folder / W4A4.name), str(checkpoint), *map(str, more)])


# --- what a run leaves --------------------------------------------------------

def test_a_run_writes_the_page(tiny_run):
    page = Page(tiny_run.folder / 'report.html')
    assert tuple(page.titles) == TITLES
    pictures = sorted(p.name for p in (tiny_run.folder / FIGURES).iterdir())
    assert len(page.images) == len(pictures) >= 10
    assert {'units.png', 'sqnr.png', 'entropy.png', 'ranges.png', 'grids.png', 'weights.png',
            'local.png', 'detections_0.png'} <= set(pictures)
    assert all(src.startswith('data:image/png;base64,') for src in page.images)
    assert (tiny_run.folder / 'calibrated.pth').is_file()


def test_nothing_is_fetched(tiny_run):
    text = (tiny_run.folder / 'report.html').read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and '@import' not in text
    assert 'url(' not in text and "default-src 'none'" in text


def test_numbers_are_those_of_report_json(tiny_run):
    page, report = Page(tiny_run.folder / 'report.html'), report_of(tiny_run.folder)
    found = report['diagnostics']
    states = ('float', 'calibrated', 'quantized')
    assert page.column('results', 1) == [report[s]['bbox_mAP'] for s in states]
    assert page.column('results', 3) == [report[s]['segm_mAP'] for s in states]
    assert page.column('results', 5)[2] == report['size_mb']['quantized']
    assert page.column('all-units', 3) == [u['loss_before'] for u in report['units']]
    assert page.column('all-units', 4) == [u['loss_after'] for u in report['units']]
    assert page.column('points', 4) == [p['quantized'] for p in found['propagation']]
    assert page.column('points', 3) == [p['calibrated'] for p in found['propagation']]
    assert None not in page.column('points', 3)
    assert page.column('heads', 3) == [h['entropy'] for h in found['attention']]
    assert page.column('activations-all', 16) == [a['sqnr_db'] for a in found['activations']]
    assert page.column('activations-all', 14) == [a['clipped'] for a in found['activations']]
    assert page.column('layers-all', 7) == [x['sqnr_db'] for x in found['layers']]
    assert page.column('phases', 1) == [p['seconds'] for p in report['phases'].values()]
    assert page.checks == [c['name'] for c in report['checks']]
    assert 'few-calibration-images' in page.checks


def test_ap_by_class_averages_to_ap(demo_run):
    report = report_of(demo_run.folder)
    for metric, key in (('bbox', 'bbox_mAP'), ('segm', 'segm_mAP')):
        values = [v for v in report['classes']['quantized'][metric].values() if v is not None]
        assert len(report['classes']['quantized'][metric]) == 6
        assert sum(values) / len(values) == pytest.approx(report['quantized'][key], abs=6e-4)
    assert not any('class/' in key for key in report['metrics']['quantized'])


def test_shown_text_rounds_the_value(tiny_run):
    page = Page(tiny_run.folder / 'report.html')
    for row in page.tables['points']:
        assert row[4][0] == f'{float(row[4][1]):.1f}'


# --- tools/report.py ----------------------------------------------------------

def test_the_tool_says_the_same(tiny_run, tmp_path, capsys):
    assert make(tiny_run, tiny_run.quantized, '--work-dir', tmp_path,
                '--float', tiny_run.checkpoint) == 0
    first, second = report_of(tiny_run.folder), report_of(tmp_path)
    for report in (first, second):
        report['diagnostics'].pop('seconds')
    for key in ('propagation', 'layers', 'activations', 'attention'):
        assert len(first['diagnostics'][key]) == len(second['diagnostics'][key])
    ours, theirs = ([p['quantized'] for p in r['diagnostics']['propagation']]
                    for r in (first, second))
    assert ours == pytest.approx(theirs, abs=0.01)  # folds are read off, not handed over
    assert first['checks'] == second['checks']
    assert 'warning: few-calibration-images' in capsys.readouterr().out
    assert tuple(Page(tmp_path / 'report.html').titles) == TITLES


def test_without_records_the_rest_is_there(tiny_run, tmp_path):
    checkpoint = copy_of(tiny_run, tmp_path / 'alone', 'quantized.pth')
    assert make(tiny_run, checkpoint) == 0
    folder = checkpoint.parent
    page = Page(folder / 'report.html')
    assert 'there is no report.json beside quantized.pth' in page.text
    assert 'without the records of its run' in page.text
    assert 'all-units' not in page.tables and page.tables['layers-all'] and page.tables['points']
    assert not (folder / 'report.json').exists() and (folder / 'diagnostics.json').exists()


def test_what_is_missing_or_of_another_run_is_said(tiny_run, tmp_path):
    """Images gone, the float checkpoint gone, calibrated.pth of another run."""
    checkpoint = copy_of(tiny_run, tmp_path / 'run', 'quantized.pth', 'report.json')
    state = torch.load(tiny_run.folder / 'calibrated.pth', weights_only=True)
    state['meta']['config'] = 'another'
    torch.save(state, checkpoint.parent / 'calibrated.pth')
    cfg = Config.fromfile(tiny_run.folder / W4A4.name)
    cfg.load_from = str(tmp_path / 'gone.pth')
    dataset = cfg.test_dataloader.dataset
    shutil.copytree(dataset.data_root, tmp_path / 'data')
    dataset.update(type='mmdet.CocoDataset', data_root=f'{tmp_path}/data/',
                   ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'),
                   metainfo=dict(classes=('disc', )))
    for key in ('split', 'num_images'):
        dataset.pop(key)
    images = sorted((tmp_path / 'data' / 'val').iterdir())
    for path in images:
        path.unlink()
    cfg.dump(tmp_path / 'config.py')
    assert report_main([str(tmp_path / 'config.py'), str(checkpoint)]) == 0
    page = Page(checkpoint.parent / 'report.html')
    assert 'gone.pth is not there' in page.text and '.png is missing' in page.text
    assert 'calibrated.pth is of another run' in page.text
    assert 'no image could be read' in page.text
    assert page.tables['all-units'] and page.tables['layers-all'] and page.tables['results']


def test_a_folder_that_cannot_be_written_is_one_line(tiny_run, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert make(tiny_run, tiny_run.quantized, '--work-dir', tmp_path / 'file' / 'below') == 2
    line, = [x for x in capsys.readouterr().err.splitlines() if 'error: ' in x]
    assert 'the report cannot be written to' in line and '--work-dir' in line


def test_a_float_checkpoint_is_refused(tiny_run, capsys):
    assert make(tiny_run, tiny_run.checkpoint, '--work-dir', tiny_run.folder.parent) == 2
    assert 'holds float weights' in capsys.readouterr().err


def test_a_failing_report_is_one_warning(tmp_path):
    """The hook never raises: the result is on the disk already."""
    said = []
    logger = SimpleNamespace(warning=said.append, isEnabledFor=lambda level: False)
    runner = SimpleNamespace(work_dir=str(tmp_path), logger=logger, quantize_loop=None, cfg={})
    DiagnosticsHook().after_quantize(runner)
    DiagnosticsHook().calibrated_model(runner, torch.nn.Linear(1, 1))
    assert len(said) == 2 and 'report.html was not written' in said[0]
    assert 'tools/report.py' in said[0] and 'calibrated.pth was not written' in said[1]


# --- in a browser -------------------------------------------------------------

SCRIPT = """<script>
const out = {};
out.images = [...document.images].filter(i => i.complete && i.naturalWidth > 300).length;
const table = document.getElementById("points");
const values = () => [...table.tBodies[0].rows].map(r => Number(r.cells[4].dataset.v));
table.tHead.rows[0].cells[4].querySelector("button").click();
out.up = values();
table.tHead.rows[0].cells[4].querySelector("button").click();
out.down = values();
out.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.title = JSON.stringify(out);
</script></body>"""


def test_in_a_browser(tiny_run, tmp_path):
    """No console error, images shown, a table sorts, nothing sticks out of the page."""
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser',
                                                   'google-chrome'))), None)
    if browser is None:
        pytest.skip('no chromium is installed (Debian: apt-get install chromium)')
    page = tmp_path / 'page.html'
    text = (tiny_run.folder / 'report.html').read_text()
    page.write_text(text.replace('</body>', SCRIPT))
    done = subprocess.run(
        [browser, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr',
         '--disable-background-networking', '--window-size=1100,900', '--dump-dom',
         f'--user-data-dir={tmp_path / "profile"}', page.as_uri()],
        capture_output=True, text=True, timeout=300)
    title = re.search(r'<title>(\{.*?\})</title>', done.stdout)
    assert title, done.stderr[-2000:]
    out = json.loads(title.group(1))
    assert not [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
    assert out['images'] == len(Page(tiny_run.folder / 'report.html').images)
    assert out['up'] == sorted(out['up']) and out['down'] == sorted(out['up'], reverse=True)
    assert len(set(out['up'])) > 5 and not out['wide']
