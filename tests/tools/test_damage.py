"""tools/dev/damage_test.py: a few cases, and what it makes of tools that misbehave."""
import random

import pytest
import torch
from demo_runs import load_tool
from mutations import BYTES, STATE, edit, harm

damage_test = load_tool('dev/damage_test')
Result = damage_test.Result
LINE = 'quant.py: error: model.quant.weight_bits=99 is not legal\n'


def test_a_few_cases(tmp_path, capsys):
    code = damage_test.main([
        '--work-dir', str(tmp_path / 'cases'), '--configs', '2', '--checkpoints', '4'])
    printed = capsys.readouterr().out.splitlines()[-1]
    assert code == 0, printed
    assert printed.startswith('2 mutated configs: ') and '; 4 damaged checkpoints: ' in printed
    assert printed.count('0 tracebacks, half-written files or wrong results') == 2
    assert len((tmp_path / 'cases' / 'cases.log').read_text().splitlines()) == 6


@pytest.mark.parametrize('result, verdict', [
    (Result(0, 'bbox_mAP: 0.1000', ''), ''), (Result(2, '', f'a warning\n{LINE}'), 'refused'),
    (Result(1, '', LINE), 'ended on the way'), (Result(2, '', ''), 'not one line'),
    (Result(2, '', LINE * 2), 'not one line'), (Result(2, '', f'x {LINE}'), 'not one line'),
    (Result(0, '', LINE), 'worked and told an error'), (Result(139, '', LINE), 'exit code 139'),
    (Result(None, '', ''), 'traceback'),
    (Result(2, '', f'Traceback (most recent call last):\n{LINE}'), 'traceback'),
], ids=lambda value: value or 'worked' if isinstance(value, str) else '')
def test_verdicts(result, verdict, tmp_path):
    assert damage_test.judge(result, 'quant.py', tmp_path) == verdict


def test_partial_files_are_seen(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / '.report.json.1.tmp').touch()
    assert damage_test.judge(Result(2, '', LINE), 'quant.py', tmp_path) == 'half-written file'


def results(folder, value=1.0, report='{}'):
    folder.mkdir()
    (folder / 'report.json').write_text(report)
    torch.save(dict(meta={}, state_dict=dict(x=torch.tensor([value]))), folder / 'quantized.pth')
    (folder / 'quantized.safetensors').write_text(str(value))
    return folder


def test_results_must_be_whole_and_the_same(tmp_path):
    whole = results(tmp_path / 'whole')
    assert damage_test.judge_run(results(tmp_path / 'same'), whole) == 'worked'
    assert damage_test.judge_run(results(tmp_path / 'other', 2.0)) == 'worked'
    assert damage_test.judge_run(tmp_path / 'other', whole) == 'wrong result'
    assert damage_test.judge_run(results(tmp_path / 'nan', float('nan'))) == 'wrong result'
    assert damage_test.judge_run(results(tmp_path / 'cut', report='{')) == 'half-written file'
    (tmp_path / 'other' / 'report.json').unlink()  # as where a config has no hook that writes it
    assert damage_test.judge_run(tmp_path / 'other') == 'half-written file'
    assert damage_test.judge_run(tmp_path / 'other', reports=False) == 'worked'
    (tmp_path / 'same' / 'quantized.pth').write_bytes(b'PK')
    assert damage_test.judge_run(tmp_path / 'same', whole) == 'half-written file'


def test_a_case_depends_on_its_number_alone():
    cfg = dict(model=dict(quant=dict(a=1, b=[2, 3])), quantize_cfg=dict(c='x'))
    first, again, other = (edit(cfg, damage_test.Draw(seed)) for seed in ('1', '1', '2'))
    assert first == again and first != other
    assert cfg == dict(model=dict(quant=dict(a=1, b=[2, 3])), quantize_cfg=dict(c='x'))


def test_every_damage_is_drawn_and_harms():
    generator, seen = random.Random(0), set()
    content = bytes(generator.randrange(1, 256) for _ in range(5000))
    for number in range(300):
        kind, name, damage = harm(damage_test.KINDS, damage_test.Draw(str(number)))
        seen.add((kind, name))
        if name in BYTES:
            assert damage(content) != content
    assert {name for _, name in seen} == {*BYTES, *STATE}
    assert not any(name in STATE for kind, name in seen if kind.endswith('safetensors'))
    assert {kind for kind, _ in seen} == set(damage_test.KINDS)


def test_bad_cases_are_counted_by_name():
    counts = damage_test.Counter({'worked': 3, 'refused': 2, 'ended on the way': 1, 'traceback': 1})
    line = damage_test.summary('mutated configs', counts)
    assert line.startswith('7 mutated configs: 3 worked, 3 ended in one line (2 refused')
    assert line.endswith('1 tracebacks, half-written files or wrong results, 1 traceback')
