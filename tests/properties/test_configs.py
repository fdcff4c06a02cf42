"""Random edits of a config: it works, or it ends in one line; nothing half-written."""
import copy
import json
from collections import Counter

import pytest
import torch
from demo_runs import QUICK, TINY, W4A4, data_options, options_as_dict
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.logging import MMLogger

from pfcr_mm.cli import quant_main
from pfcr_mm.models.checkpoint import read_checkpoint

from .conftest import EXAMPLES, examples

OPTIONS = (
    *TINY, *QUICK[:-1], 'quantize_cfg.calibration.method=minmax', 'quantize_cfg.parts=[neck]',
    'quantize_cfg.calibration.images=4', 'quantize_cfg.calibration.held_out=1',
    'quantize_cfg.calibration.search_images=2', 'quantize_cfg.calibration.rows=64',
    'quantize_cfg.reconstruction.iters=1', 'quantize_cfg.head_reconstruction.iters=1',
    'quantize_cfg.head_reconstruction.per_level.leaf.iters=1')
class Odd(float):
    """NaN and Inf, written as Python reads them."""

    def __repr__(self):
        return f"float('{float(self)}')"


# No large numbers: a run of a million steps is what such a config asks for.
JUNK = (None, True, False, -1, 0, 1, 3, 2.5, -0.5, Odd('nan'), Odd('inf'), '', 'x', 'none',
        [], [1], ['x'], [None], {}, {'x': 1}, {'type': 'Nothing'}, [[]], 'leaf', '*')
OURS = ('model.quant', 'quantize_cfg', 'quantize_hooks')
# Where things lie, and what only training reads.
LEFT_OUT = ('work_dir', 'load_from', 'data_root', 'backend_args', 'param_scheduler', 'filename',
            'optim_wrapper', 'train_pipeline', 'test_pipeline', 'auto_scale_lr', 'val_',
            'model.train_cfg', 'train_cfg')


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
    path = root / 'mutated.py'
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in cfg.items()))
    return quant_main([str(path), str(checkpoint), '--work-dir', str(work_dir)]), checkpoint


def places(value, path=()):
    """All keys of nested data, as tuples."""
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


@st.composite
def edits(draw, cfg):
    """(what was done, edited config)."""
    cfg = copy.deepcopy(cfg)
    known = [p for p in places(cfg) if not any(
        '.'.join(map(str, p)).startswith(k) or str(p[-1]).startswith(k) for k in LEFT_OUT)]
    ours = [p for p in known if '.'.join(map(str, p)).startswith(OURS)]
    done = []
    for _ in range(draw(st.integers(1, 2))):
        *path, key = draw(st.sampled_from(ours if draw(st.booleans()) else known))
        parent = cfg
        try:
            for step in path:
                parent = parent[step]
            value = parent[key]
        except (KeyError, IndexError, TypeError):
            continue  # gone by the edit before
        kind = draw(st.sampled_from(['value', 'value', 'value', 'delete', 'rename', 'wrap']))
        if kind == 'delete':
            del parent[key]
        elif kind == 'rename' and isinstance(parent, dict):
            parent[f'{key}s'] = parent.pop(key)
        elif kind == 'wrap':
            parent[key] = [value]
        else:
            parent[key] = value = copy.deepcopy(draw(st.sampled_from(JUNK)))
        done.append(f"{kind} {'.'.join(map(str, (*path, key)))} {value!r:.40}")
    return done, cfg


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
