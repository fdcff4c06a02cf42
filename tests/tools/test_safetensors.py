"""tools/test.py takes quantized.safetensors as it takes quantized.pth."""
from demo_runs import W4A4, arguments

from pfcr_mm.cli import test_main as check_main


def test_the_same_figures(tiny_run, tmp_path, capsys):
    for name in ('quantized.pth', 'quantized.safetensors'):
        path = tiny_run.folder / name
        assert check_main(arguments(W4A4, path, tmp_path / path.suffix, tiny_run.options)) == 0
        lines = capsys.readouterr().out.splitlines()
        for key, value in tiny_run.report['quantized'].items():
            assert f'{key}: {value:.4f}' in lines


def test_damage_ends_in_one_line(tiny_run, tmp_path, capsys):
    content = bytearray((tiny_run.folder / 'quantized.safetensors').read_bytes())
    content[-9] ^= 1
    path = tmp_path / 'q.safetensors'
    path.write_bytes(content)
    assert check_main(arguments(W4A4, path, tmp_path / 'run', tiny_run.options)) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert str(path) in line and 'checksum' in line
