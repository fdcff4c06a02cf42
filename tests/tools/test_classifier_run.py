"""The command lines on a tiny classifier: the code path that detectors take."""
import json
from pathlib import Path

import demo_runs
import pytest
import torch
from demo_runs import REPO
from mmengine.config import Config
from tiny_classifiers import CLASSES, build_classifier, float_state, write_folder

from pfcr_mm.cli import quant_main
from pfcr_mm.cli import test_main as check_main
from pfcr_mm.registry import DATASETS

W4A4 = REPO / 'configs' / 'classification' / 'pfcr_vit_ti_w4a4.py'
COUNT, HELD_OUT = 8, 2


def options(root, iters=2):
    """Options of a quick run of the tiny ViT on the images below `root`."""
    return (
        'model.timm_args.img_size=64', 'model.timm_args.depth=4', 'model.timm_args.embed_dim=32',
        'model.timm_args.num_heads=2', f'model.num_classes={CLASSES}',
        *(f'{split}_dataloader.dataset.{key}' for split in ('train', 'test') for key in (
            f'data_root={root}', f'num_classes={CLASSES}', f'draw.count={COUNT}',
            'pipeline.0.timm_args.img_size=64')),
        f'quantize_cfg.calibration.images={COUNT}',
        f'quantize_cfg.calibration.held_out={HELD_OUT}', 'quantize_cfg.calibration.rows=128',
        f'quantize_cfg.reconstruction.iters={iters}',
        *(f'quantize_cfg.reconstruction.per_level.{level}.iters={iters}'
          for level in ('pair', 'quad', 'backbone')))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(folder, float checkpoint, options, exit code) of a finished run."""
    base = tmp_path_factory.mktemp('classifier')
    root = write_folder(base / 'images')
    torch.save(float_state(build_classifier('vit')), base / 'float.pth')
    code = quant_main(
        demo_runs.arguments(W4A4, base / 'float.pth', base / 'run', options(root)))
    return base / 'run', base / 'float.pth', options(root), code


def test_report(run):
    folder, _, _, code = run
    assert code == 0
    report = json.loads((folder / 'report.json').read_text())
    assert report['model'] == 'TimmClassifier' and report['bits'] == dict(weight=4, activation=4)
    for state in ('float', 'calibrated', 'quantized'):
        assert list(report[state]) == ['top1', 'top5'] and report[state]['top5'] == 1
    near = {state: (found['imagenet/kl'], found['imagenet/same'])
            for state, found in report['metrics'].items()}
    assert near['float'] == (0, 1)
    assert all(near[state][0] > 0 for state in ('calibrated', 'quantized'))
    assert report['calibration'] == dict(images=COUNT, split='train')
    assert [u['level'] for u in report['units']].count('quad') == 1
    assert report['units'][-1]['name'] == 'backbone' and report['parts_without_chain'] == {}
    lines = (folder / 'report.md').read_text().splitlines()
    table = next(line for line in lines if 'size (MB)' in line)
    assert [cell.strip() for cell in table.split('|')[2:7]] == [
        'top-1', 'top-5', 'divergence', 'same class', 'size (MB)']
    last = [cell.strip() for cell in lines[lines.index(table) + 4].split('|')]
    kl, same = near['quantized']
    assert last[4:6] == [f'{kl:.3f}', f'{100 * same:.1f}']
    assert 'accuracy in percent' in lines[2]


def test_reports_say_which_layers_quantize_class_tokens_apart(run):
    """All linear layers of blocks may; matmuls and the ends of the network may not."""
    folder, *_ = run
    report = json.loads((folder / 'report.json').read_text())
    state = torch.load(folder / 'quantized.pth', weights_only=True)['state_dict']
    wanted = {
        name: 'own' if f'{name}.token_quantizer.log_scale' in state else 'shared'
        for name in (f'backbone.blocks.{block}.{layer}' for block in range(4)
                     for layer in ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'))}
    assert 'own' in wanted.values()
    for layers in (report['layers'], report['diagnostics']['layers']):
        assert {e['name']: e['class_tokens'] for e in layers if 'class_tokens' in e} == wanted
    lines = (folder / 'report.md').read_text().splitlines()
    for name, choice in wanted.items():
        assert any(line.startswith(f'| {name} |') and line.endswith(f'| {choice} |')
                   for line in lines)
    page = (folder / 'report.html').read_text()
    assert page.count(', class tokens own') == list(wanted.values()).count('own')


def test_the_page_leaves_out_what_a_classifier_has_not(run):
    folder, *_ = run
    text = (folder / 'report.html').read_text()
    assert 'A classifier has no boxes or masks to draw' in text and 'top-1' in text
    assert 'both models name the same class' in text and 'same class</th>' in text
    assert 'box AP' not in text
    found = json.loads((folder / 'report.json').read_text())['diagnostics']
    assert found['agreement']['images'] == found['compared_images'] > 0
    assert not list((folder / 'report_figures').glob('detections*'))
    assert found['propagation'][-1]['name'] == 'head' and found['attention']


def test_the_checkpoint_tests_the_same(run, tmp_path, capsys):
    folder, _, given, _ = run
    assert check_main(demo_runs.arguments(W4A4, folder / 'quantized.pth', tmp_path, given)) == 0
    report = json.loads((folder / 'report.json').read_text())
    printed = capsys.readouterr().out
    assert f"top1: {report['quantized']['top1']:.4f}" in printed and 'top5: 1.0000' in printed


def test_the_float_twin_stands_in_for_its_evaluation(run, tmp_path):
    """Divergences are the same where the float model is not measured."""
    folder, checkpoint, given, _ = run
    given = (*given, 'quantize_cfg.evaluate.float=False')
    assert quant_main(demo_runs.arguments(W4A4, checkpoint, tmp_path / 'run', given)) == 0
    with_it, without = (
        json.loads((path / 'report.json').read_text())['metrics']['quantized']['imagenet/kl']
        for path in (folder, tmp_path / 'run'))
    assert without == pytest.approx(with_it, rel=1e-3)


def test_calibration_and_evaluation_share_no_image(run):
    cfg = Config.fromfile(run[0] / W4A4.name)
    train, test = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset
    assert (train.draw.count, train.draw.seed, train.draw.get('rest', False)) == (COUNT, 0, False)
    assert (test.draw.count, test.draw.seed, test.draw.rest) == (COUNT, 0, True)


def refused(args, capsys, *words):
    capsys.readouterr()
    assert quant_main([str(a) for a in args]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if 'error: ' in line]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


def test_a_leak_is_refused(run, tmp_path, capsys):
    leak = (*run[2], 'test_dataloader.dataset.draw.rest=False', 'quantize_cfg.levels=[]')
    refused(demo_runs.arguments(W4A4, run[1], tmp_path, leak), capsys,
            '.JPEG is both in the calibration set and in the test set')


def test_a_leak_into_val_is_refused_before_anything_is_computed(run, tmp_path, capsys):
    config = tmp_path / 'with_val.py'
    config.write_text(
        f'_base_ = {str(W4A4)!r}\n'
        'val_dataloader = {{_base_.train_dataloader}}\n'
        'val_evaluator = {{_base_.test_evaluator}}\n'
        "val_cfg = dict(type='ValLoop')\n")
    given = (*run[2], f'val_dataloader.dataset.data_root={run[0].parent / "images"}',
             f'val_dataloader.dataset.num_classes={CLASSES}',
             f'val_dataloader.dataset.draw.count={COUNT}', 'quantize_cfg.evaluate.val=True')
    refused(demo_runs.arguments(config, run[1], tmp_path / 'run', given), capsys,
            '.JPEG is both in the calibration set and in the val set')
    assert not list((tmp_path / 'run').glob('calibrated.pth'))


@pytest.mark.parametrize('option, word', [
    ('model.model_name=resnet50', "'resnet50' is no plain transformer"),
    ('model.num_classes=7', 'head'),
    ('train_dataloader.dataset.num_classes=3', 'labels.txt:13: class 3 is out of range'),
    ('test_dataloader.dataset.ann_file=nobody.txt', 'nobody.txt is missing'),
    ('train_dataloader.dataset.draw.count=20', 'draw.count=20'),
    ('train_dataloader.dataset.data_root=nowhere', 'nowhere'),
])
def test_bad_input(option, word, run, tmp_path, capsys):
    refused(demo_runs.arguments(W4A4, run[1], tmp_path, (*run[2], option)), capsys, word)


def broken_run(run, tmp_path, rest):
    """A run with one broken image, among those drawn or among the others."""
    root = write_folder(tmp_path / 'images')
    dataset = Config.fromfile(run[0] / W4A4.name).train_dataloader.dataset
    dataset.update(data_root=str(root), draw=dict(count=COUNT, seed=0, rest=rest))
    path = DATASETS.build(dataset).get_data_info(0)['img_path']
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:len(content) // 2])
    given = (*options(root), 'quantize_cfg.levels=[]', 'quantize_cfg.pos.mode=off',
             'quantize_cfg.evaluate.float=False', 'quantize_cfg.evaluate.calibrated=False')
    return path, demo_runs.arguments(W4A4, run[1], tmp_path / 'run', given)


def test_a_broken_image_is_left_out_of_calibration(run, tmp_path):
    path, arguments = broken_run(run, tmp_path, rest=False)
    assert quant_main(arguments) == 0
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    assert report['calibration']['images'] == COUNT - 1
    note, = [note for note in report['notes'] if path in note]
    assert note.endswith('it is left out of calibration')


def test_a_broken_image_ends_an_evaluation(run, tmp_path, capsys):
    path, arguments = broken_run(run, tmp_path, rest=True)
    refused(arguments, capsys, f'image {path} cannot be read as an image')
