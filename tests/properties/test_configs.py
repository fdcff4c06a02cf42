"""Random edits of a config: it works, or it ends in one line; nothing half-written."""
import json
from collections import Counter

import pytest
import torch
from demo_runs import W4A4, data_options, options_as_dict
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.logging import MMLogger
from mutations import OPTIONS, edit, wants_report, write_config

from pfcr_mm.cli import quant_main
from pfcr_mm.models.checkpoint import read_checkpoint

from .conftest import EXAMPLES, Drawn, examples


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """The config of a quick run as plain data; its images are drawn already."""
    root = tmp_path_factory.mktemp('configs')
    cfg = Config.fromfile(W4A4)
    cfg.merge_from_dict(options_as_dict((*OPTIONS, *data_options(root / 'shapes', 4, 2))))
    cfg = cfg.to_dict()
    assert run(cfg, root / 'plain', root)[0] == 0
    return cfg, root


@pytest.fixture(autouse=True, scope='module')
def _no_formatter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
        yield


def run(cfg, work_dir, root):
    """Quantize; returns exit code and checkpoint."""
    from demo_runs import save_tiny
    checkpoint = root / 'float.pth'
    if not checkpoint.exists():
        save_tiny(checkpoint)
    MMLogger._instance_dict.clear()
    path = write_config(root / 'mutated.py', cfg)
    return quant_main([str(path), str(checkpoint), '--work-dir', str(work_dir)]), checkpoint


@st.composite
def edits(draw, cfg):
    """(what was done, edited config)."""
    return edit(cfg, Drawn(draw))


def test_mutated_configs(base, tmp_path, capsys, monkeypatch):
    cfg, root = base
    monkeypatch.chdir(tmp_path)  # a data_root may have become '' or 'x'
    codes, lines = Counter(), []

    @examples(12)
    @given(edits(cfg))
    def check(edit):
        done, edited = edit
        work_dir = tmp_path / f'run{sum(codes.values())}'
        capsys.readouterr()
        code, _ = run(edited, work_dir, root)
        out, err = capsys.readouterr()
        assert 'Traceback' not in out + err, (done, err)
        assert code in (0, 1, 2), done
        assert not [p for p in tmp_path.rglob('.*.tmp')], done
        told = [line for line in err.splitlines() if 'error: ' in line]
        if code == 0:
            assert not told, (done, err)
            if wants_report(edited):
                json.loads((work_dir / 'report.json').read_text())
            state = read_checkpoint(work_dir / 'quantized.pth')['state_dict']
            assert all(torch.isfinite(v).all() for v in state.values()
                       if v.is_floating_point()), done
        else:
            assert len(told) == 1 and told[0].startswith('quant.py: error: '), (done, err)
            assert not (work_dir / 'report.json').exists(), done
        codes[code] += 1
        lines.append(f'{code} {"; ".join(done)} -> {told}')

    check()
    if EXAMPLES:
        (root / 'mutated.log').write_text('\n'.join(lines))
        print(f'\nmutated configs: {sum(codes.values())}, worked {codes[0]}, refused {codes[2]}, '
              f'ended in one line on the way {codes[1]}; see {root}/mutated.log')
