"""The page that adds a backbone: its code runs as it stands."""
import re
import sys

import pytest
import torch
from demo_runs import REPO
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny_models import calibrated, predict

from pfcr_mm.cli import quant_main
from pfcr_mm.models import part_chains, reparameterise
from pfcr_mm.models.reparam import make_channelwise
from pfcr_mm.reconstruction import build_schedule, traversal_string

PAGE = REPO / 'docs' / 'adding_a_backbone.md'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The page's files, importable."""
    folder = tmp_path_factory.mktemp('page')
    for block in re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL):
        name = re.match(r'# (\S+\.py)\n', block)[1]
        with (folder / name).open('a') as file:
            file.write(block)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope='module')
def detector(folder):
    model = Config.fromfile(folder / 'my_quant_config.py').model
    model.neck.out_channels = model.bbox_head.in_channels = model.bbox_head.feat_channels = 16
    model.test_cfg.update(nms_pre=20, max_per_img=5)
    detector = MODELS.build(model)
    detector.eval()
    return detector.requires_grad_(False)


def test_its_own_test(folder):
    import test_my_mixer
    test_my_mixer.test_chain()


def test_the_schedule_is_fine_to_coarse(detector):
    chains, without = part_chains(detector)
    assert list(chains) == ['backbone', 'neck'] and list(without) == ['bbox_head']
    levels = ['leaf', 'block', 'pair', 'stage', 'backbone']
    assert traversal_string(build_schedule(chains['backbone'], levels)) == (
        'E1 A1 M1 B1 A2 M2 B2 P1 D1 S1 A3 M3 B3 A4 M4 B4 P2 S2 ALL')


def test_calibrates_folds_and_predicts(detector, images):
    inputs, samples = images[0]
    before = detector.backbone(inputs)
    make_channelwise(detector)
    calibrated(detector, images[:2], on=False)
    assert len(reparameterise(detector)) == 4
    for a, b in zip(detector.backbone(inputs), before):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert predict(detector, inputs, samples) is not None


def test_the_command(folder, capsys):
    assert quant_main([str(folder / 'my_quant_config.py'), 'my_float_checkpoint.pth',
                       '--dry-run']) == 0
    plan = capsys.readouterr().out
    assert 'E1 A1 M1 B1 A2 M2 B2 P1 D1' in plan
    assert 'no chain is registered for RetinaHead' in plan


def test_the_page_says_what_the_plan_says():
    assert 'backbone: calibrated only (no chain is registered for MixerBackbone)' in (
        PAGE.read_text())
