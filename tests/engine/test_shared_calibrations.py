"""Runs that differ only in what follows calibration may share it, and come to the same bytes."""
import json

import pytest
from demo_runs import W4A4, arguments, load_tool
from mmengine.logging import MMLogger

from pfcr_mm.cli import quant_config, quant_main
from pfcr_mm.engine.loops import PFCRLoop
from pfcr_mm.engine.resumable import environment
from pfcr_mm.engine.resume import identity
from pfcr_mm.engine.shared_calibrations import SharedCalibrations
from pfcr_mm.errors import FaultError

kill_test = load_tool('dev/kill_test')

FIRST = ['quantize_cfg.levels=[]', 'quantize_cfg.head_levels=[]', 'quantize_cfg.pos.mode=off']
SECOND = ['quantize_cfg.levels=[block]', 'quantize_cfg.head_levels=[chain]',
          'quantize_cfg.pos.stage1_levels=[block]', 'quantize_cfg.reconstruction.loss=mse',
          'quantize_cfg.reconstruction.keep_prob=0.5', 'quantize_cfg.evaluate.calibrated=False']


@pytest.fixture()
def run(tiny_run, tmp_path, monkeypatch):
    """run(name, options): (work dir, how often the run calibrated); all share tmp_path/shared."""
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
    calls, calibrate = [], PFCRLoop.calibrate
    monkeypatch.setattr(PFCRLoop, 'calibrate', lambda loop: (calls.append(1), calibrate(loop)))
    base = [*tiny_run.options, 'quantize_cfg.calibration.method=minmax',
            'quantize_hooks.6.enabled=False']

    def call(name, options, shared=tmp_path / 'shared'):
        MMLogger._instance_dict.clear()
        calls.clear()
        where = [f'quantize_cfg.calibration_dir={shared}'] if shared else []
        code = quant_main(arguments(
            W4A4, tiny_run.checkpoint, tmp_path / name, [*base, *options, *where]))
        assert code == 0
        return tmp_path / name, len(calls)

    return call


def test_the_second_run_begins_with_it_and_ends_with_the_same_bytes(run, tmp_path):
    assert run('first', FIRST)[1] == 1
    [shared] = (tmp_path / 'shared').iterdir()
    alone, calibrated = run('alone', SECOND, shared=None)
    assert calibrated == 1
    after, calibrated = run('after', SECOND)
    assert calibrated == 0 and list((tmp_path / 'shared').iterdir()) == [shared]
    assert (after / 'quantized.pth').read_bytes() == (alone / 'quantized.pth').read_bytes()
    scalars = [''.join(path.read_text() for path in folder.glob('*/vis_data/*.json'))
               for folder in (after, alone)]
    assert all('float/bbox_mAP' in text for text in scalars)
    units = kill_test.read_units(after / 'units.jsonl')
    assert units == kill_test.read_units(alone / 'units.jsonl') and len(units) > 4
    reports = [kill_test.read_report(folder / 'report.json') for folder in (after, alone)]
    notes = [set(report.pop('notes')) for report in reports]
    assert reports[0] == reports[1] and reports[0]['float']
    [note] = notes[0] - notes[1]
    assert note == (f'calibration is that of another run, from {shared}; its seconds are counted '
                    'in')


def test_each_run_has_its_own_notes_and_seconds(run, tmp_path):
    """What the first was told of its config is not the second's, and the other way round."""
    run('first', ['quantize_cfg.levels=[leaf]', 'quantize_cfg.head_levels=[]',
                  'quantize_cfg.pos.stage1_levels=[block]'])
    folder, calibrated = run('second', FIRST)
    assert calibrated == 0
    report = json.loads((folder / 'report.json').read_text())
    first = json.loads((tmp_path / 'first' / 'report.json').read_text())
    [own] = [note for note in first['notes'] if 'POS stage 1 has no units' in note]
    assert own not in report['notes']
    shared = sum(first['phases'][name]['seconds'] for name in ('evaluate float', 'calibrate'))
    assert report['phases']['calibrate'] == first['phases']['calibrate']
    assert report['seconds'] > shared
    folder, _ = run('third', ['quantize_cfg.levels=[leaf]', 'quantize_cfg.head_levels=[]',
                              'quantize_cfg.pos.stage1_levels=[pair]'])
    assert any('stage 1 has no units' in note
               for note in json.loads((folder / 'report.json').read_text())['notes'])


def test_a_calibration_that_cannot_be_left_is_told(run, tmp_path, monkeypatch):
    def full(self, state):
        raise FaultError('disk full')

    monkeypatch.setattr(SharedCalibrations, 'leave', full)
    folder, _ = run('first', FIRST)
    [log] = folder.glob('*/*.log')
    assert 'this calibration is not shared' in log.read_text()


@pytest.mark.parametrize('option, same', [
    ('model.quant.first_last_bits=None', False), ('model.quant.first_last_bits=8', True),
    ('model.quant.post_gelu=None', False), ('quantize_cfg.evaluate.val=True', False),
    ('custom_imports.imports=[json]', False), ('env_cfg.cudnn_benchmark=True', False),
    ('quantize_cfg.calibration.rows=64', False), ('model.quant.weight_bits=3', False),
    ('randomness.seed=5', False), ('test_dataloader.dataset.num_images=5', False),
    ('quantize_cfg.evaluate.float=False', False), ('quantize_cfg.parts=[neck]', False),
    ('quantize_cfg.total_iters=90', True), ('quantize_cfg.pos.mode=unit', True),
    ('quantize_cfg.reconstruction.per_level.pair.iters=9', True),
    ('quantize_cfg.evaluate.calibrated=False', True), ('quantize_cfg.levels=[leaf]', True)])
def test_what_calibration_depends_on_names_the_file(tiny_run, tmp_path, option, same):
    cfgs = [quant_config(arguments(W4A4, None, tmp_path, [*tiny_run.options, *more]))
            for more in ([], [option])]
    paths = {SharedCalibrations(tmp_path, identity(cfg), {}, cfg).path for cfg in cfgs}
    assert len(paths) == (1 if same else 2)


def test_another_val_set_is_another_identity_where_it_is_measured(tiny_run, tmp_path):
    base = [*tiny_run.options, 'quantize_cfg.evaluate.val=True']
    changed = ['val_evaluator.ann_file=other.json', 'val_dataloader.num_workers=3']
    one, other = (identity(quant_config(arguments(W4A4, None, tmp_path, [*base, *more])))
                  for more in ([], changed))
    assert {k for k in one if one[k] != other[k]} == {'val_evaluator.ann_file'}


def test_a_damaged_file_is_told_and_replaced(run, tmp_path):
    run('first', FIRST)
    [shared] = (tmp_path / 'shared').iterdir()
    whole = shared.read_bytes()
    shared.write_bytes(whole[:-100])
    folder, calibrated = run('second', FIRST)
    assert calibrated == 1 and len(shared.read_bytes()) == len(whole)
    [log] = folder.glob('*/*.log')
    assert f'checkpoint {shared} is damaged' in log.read_text()
    assert 'calibrating anew' in log.read_text()


def test_other_code_or_threads_have_a_file_of_their_own(tmp_path, monkeypatch):
    def path(threads):
        of_run = dict(environment(), threads=threads)
        return SharedCalibrations(tmp_path, {'seed': '0'}, of_run, {}).path

    paths = [path(threads) for threads in (1, 1, 2)]
    monkeypatch.setattr('pfcr_mm.engine.resumable.CODE', 'another version')
    paths.append(path(1))
    assert paths[0] == paths[1] and len(set(paths)) == 3


def test_a_folder_that_cannot_be_made(tiny_run, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    options = [*tiny_run.options, *FIRST, f"quantize_cfg.calibration_dir={tmp_path / 'file'}"]
    MMLogger._instance_dict.clear()
    assert quant_main(arguments(W4A4, tiny_run.checkpoint, tmp_path / 'run', options)) == 2
    error = capsys.readouterr().err
    assert f"quantize_cfg.calibration_dir='{tmp_path / 'file'}' cannot be written to" in error
