"""What a method is called, from the command line to the report's pages."""
from types import SimpleNamespace

import pytest
from demo_runs import REPO, W4A4
from mmengine.config import Config

from pfcr_mm.analysis import figures, signal_figures
from pfcr_mm.analysis.page import render
from pfcr_mm.cli import quant_config
from pfcr_mm.engine.fingerprint import fingerprint
from pfcr_mm.engine.hooks.report import table
from pfcr_mm.engine.method import labels, method_name
from pfcr_mm.errors import UsageError

METHODS = REPO / 'configs' / '_base_' / 'methods'
MASKED = dict(bbox_mAP=0.5, segm_mAP=0.4)


@pytest.mark.parametrize('cfg, units, name', [
    ({}, ['u'], 'PFCR'), ({}, [], 'calibration only'),
    (dict(method_file='a/brecq.py'), ['u'], 'brecq'),
    (dict(method_file='a/calibrate.py'), [], 'calibration only'),
    (dict(method='BRECQ', method_file='a/b.py'), ['u'], 'BRECQ'),
    (dict(method='RepQ-ViT'), [], 'RepQ-ViT'),
], ids=lambda value: str(value))
def test_a_given_name_goes_first(cfg, units, name):
    assert method_name(cfg, units) == name


def test_the_command_line_says_which(tmp_path):
    config = tmp_path / 'named.py'
    config.write_text(f"_base_ = '{W4A4}'\nmethod = 'ours'\n")
    nameless = tmp_path / 'shorter.py'
    nameless.write_text('quantize_cfg = dict(total_iters=999)\n')
    plain, brecq, shorter = (quant_config([str(config), *more]) for more in (
        [], ['--method', str(METHODS / 'brecq.py')], ['--method', str(nameless)]))
    assert method_name(plain, ['u']) == 'ours'  # the file that is laid over has its own
    assert method_name(brecq, ['u']) == 'BRECQ'
    assert method_name(shorter, ['u']) == 'shorter'
    shorter.dump(tmp_path / 'flat.py')
    assert method_name(Config.fromfile(tmp_path / 'flat.py'), ['u']) == 'shorter'


def test_a_name_changes_no_result():
    cfg = Config(dict(model=dict(type='x')))
    before = fingerprint(cfg)
    cfg.method, cfg.method_file = 'a', 'b.py'
    assert fingerprint(cfg) == before


@pytest.mark.parametrize('name', [5, '', [], dict(a=1)], ids=str)
def test_what_is_no_name_is_refused(name, tmp_path):
    config = tmp_path / 'named.py'
    config.write_text(f"_base_ = '{W4A4}'\nmethod = {name!r}\n")
    with pytest.raises(UsageError, match='^method=.* is not a name'):
        quant_config([str(config)])


def report_of(**more):
    classes = dict(float=dict(bbox=dict(disc=0.5)), quantized=dict(bbox=dict(disc=0.4)))
    points = [dict(part='backbone', name=f'stages.{i}', kind='leaf', block=i, letter='A',
                   calibrated=9.0, quantized=12.0) for i in range(3)]
    return dict(
        dict(model='MaskRCNN', bits=dict(weight=4, activation=4), float=MASKED, quantized=MASKED,
             size_mb=dict(float=4, quantized=1), classes=classes, checks=[],
             diagnostics=dict(propagation=points, images=[], compared_images=0, notes=[])), **more)


@pytest.mark.parametrize('method, name', [('brecq', 'brecq'), ('PFCR', 'PFCR'),
                                          ('calibration only', 'calibration only'),
                                          (None, 'quantized')])
def test_page_and_table_use_the_name(method, name):
    report = report_of(method=method)
    page, pictures = render(report, SimpleNamespace(pairs=[], classes=[]), [])
    assert f'<td>{name}</td>' in page and f'{name} minus float' in page
    assert f'{name} (dB)' in page and {'sqnr', 'classes_bbox'} <= set(pictures)
    assert ('PFCR' in page) == (name == 'PFCR')
    assert (f'<h1>MaskRCNN, W4A4, {name}</h1>' in page) == (method is not None)
    assert f'| W4A4 {name} ' in table(report)[-1]


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_figures_use_the_name():
    report = report_of(method='brecq')
    names = labels(report)
    made = figures.classes(report['classes'], 'bbox', names)
    assert 'brecq' in legend(made) and 'brecq minus float' in made.axes[0].get_xlabel()
    made = signal_figures.propagation(report['diagnostics']['propagation'], names)
    assert legend(made) == ['calibrated only', 'brecq']
    heads = [dict(name='a', head=0, float_entropy=0.5, entropy=0.4)]
    made = signal_figures.attention_entropy(heads, names)
    assert [t.get_text() for t in made.axes[1].get_legend().get_texts()] == ['float', 'brecq']
