"""--dry-run: the plan of every config, with neither data nor checkpoint nor network."""
import re
import socket
import time

import demo_runs
import pytest
import torch
from demo_runs import REPO, arguments

from pfcr_mm.cli import quant_main

CONFIGS = REPO / 'configs'
# One of each shape of detector, the largest Swin among them; tests/configs has all configs.
COCO = [path for path in sorted(CONFIGS.glob('pfcr_*_w4a4.py'))
        if path.stem.startswith(('pfcr_cascade_maskrcnn_swin_s', 'pfcr_maskrcnn_swin_t_official'))
        or path.stem.startswith('pfcr_maskrcnn_vit')]


@pytest.fixture()
def alone(tmp_path, monkeypatch):
    """An empty folder, no network, no checkpoint."""

    def refuse(*_, **__):
        raise AssertionError('a dry run asks for nothing')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(torch, 'load', refuse)
    return tmp_path


@pytest.mark.parametrize('config', COCO, ids=lambda path: path.stem)
def test_every_coco_config(config, alone, capsys):
    folder = alone / 'run'
    folder.mkdir()
    (folder / 'report.json').write_text('{}')
    began = time.process_time()  # the machine may be busy
    assert quant_main([str(config), '--dry-run', '--work-dir', str(folder)]) == 0
    assert time.process_time() - began < 60
    assert [path.name for path in alone.rglob('*')] == ['run', 'report.json']  # left as it is
    plan = capsys.readouterr().out
    assert 'Plan: W4A4' in plan and '256 training images, 32 of them' in plan
    cascade = ('.0', '.1', '.2') if 'cascade' in config.stem else ('', )
    for part in ('backbone', 'neck', 'rpn_head', *(
            f'roi_head.{kind}_head{stage}' for kind in ('bbox', 'mask') for stage in cascade)):
        assert re.search(rf'stage 2 {re.escape(part)}: \d+ units, about \d+ MB: \w', plan), part
        assert re.search(rf'\d+ {re.escape(part)}\b', plan)  # layers
    assert 'cached activations: about' in plan and 'not looked at: data, checkpoint' in plan
    assert f'up to {"1024x1024" if "vit" in config.stem else "1344x800"} pixels' in plan


def test_a_users_own_detector(alone, capsys):
    """The README's recipe, on a detector most of which has no chain."""
    config = alone / 'mine.py'
    config.write_text(
        "_base_ = ['mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py', 'pfcr_mm::_base_/pfcr.py']\n"
        "model = dict(type='pfcr_mm.QuantDetector', arch='RetinaNet',\n"
        "             quant=dict(weight_bits=4, activation_bits=4))\n")
    assert quant_main([str(config), '--dry-run']) == 0
    out = capsys.readouterr().out
    assert "POS stage 1 has no units: its parts ('backbone',) have no chain" in out
    plan = [line.strip() for line in out.splitlines()]
    assert any(line.startswith('stage 2 neck: 3 units') for line in plan)
    for part, kind in (('backbone', 'PyramidVisionTransformer'), ('bbox_head', 'RetinaHead')):
        assert f'{part}: calibrated only (no chain is registered for {kind})' in plan
    # every attention of the backbone in one line
    assert [line for line in plan if line.startswith('skipped')] == [
        'skipped backbone.layers.0.1.1.attn.attn and 15 more: nn.MultiheadAttention computes in '
        'one piece; it stays float']


def test_a_wrong_key_is_told_all_the_same(alone, capsys):
    config = str(CONFIGS / 'pfcr_maskrcnn_swin_t_w4a4.py')
    assert quant_main([config, '--dry-run', '--cfg-options', 'quantize_cfg.parts=[hed]']) == 2
    assert "quantize_cfg.parts: 'hed' matches no part" in capsys.readouterr().err


def test_the_run_prints_the_same_plan(tiny_run, tmp_path, capsys):
    """All but the last line, and the sizes of images that the data tell better."""
    args = arguments(demo_runs.W4A4, tiny_run.checkpoint, tmp_path, tiny_run.options)
    assert quant_main([*args[:2], '--dry-run', *args[2:]]) == 0
    plan = [line.strip() for line in capsys.readouterr().out.splitlines()
            if line.startswith(('Plan:', '  '))]
    log = next(tiny_run.folder.rglob('*.log')).read_text()
    assert len(plan) > 8
    for line in plan[:-1]:
        assert line in log, line
