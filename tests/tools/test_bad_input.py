"""A mistake of the user's: exit code 2, one line that names the key or file, no traceback."""
import json

import demo_runs
import pytest
import torch
from demo_runs import REPO, W4A4, arguments, run_tool

from pfcr_mm.cli import quant_config, quant_main
from pfcr_mm.cli import test_main as check_main
from pfcr_mm.datasets import CLASSES, write_shapes


@pytest.fixture()
def refused(capsys):
    """refused(main, args, *words): the call ends with code 2 and one line with these words."""

    def check(main, args, *words):
        capsys.readouterr()
        code = main([str(a) for a in args])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert code == 2, lines
        assert len(lines) == 1, lines
        assert ': error: ' in lines[0]
        for word in words:
            assert str(word) in lines[0]

    return check


# --- keys of the config -----------------------------------------------------

@pytest.mark.parametrize('option, word', [
    ('model.quant.softmax.kind=cubic', "quant.softmax.kind='cubic'"),
    ('model.quant.softmax.granularity=pixel', "granularity='pixel'"),
    ('model.quant.softmax.bit=3', 'quant.softmax.bit '),
    ('model.quant.post_gelu.kind=cubic', "quant.post_gelu.kind='cubic'"),
    ('model.quant.post_gelu=adalog', "quant.post_gelu='adalog' is no dict"),
    ('model.quant.post_gelu.shift=-1', 'shift=-1'),
    ('model.quant.matmul_granularity=pixel', "granularity='pixel'"),
    ('model.quant.rounding=upwards', "quant.rounding='upwards'"),
    ('model.quant.weight_bits=1', 'quant.weight_bits=1'),
    ('model.quant.weight_bits=9', 'quant.weight_bits=9'),
    ('model.quant.activation_bits=4.5', 'quant.activation_bits=4.5'),
    ('model.quant.activation_bits=four', "quant.activation_bits='four'"),
    ('model.quant.first_last_bits=16', 'quant.first_last_bits=16'),
    ('model.quant.include=[backbon.*]', "quant.include: the pattern 'backbon.*'"),
    ('model.quant.exclude=[nothing*]', "quant.exclude: the pattern 'nothing*'"),
    ('model.quant.weight_bit=4', 'quant.weight_bit '),
    ('quantize_cfg.levels=[leaf,window]', "quantize_cfg.levels has 'window'"),
    ('quantize_cfg.head_levels=[window]', "quantize_cfg.head_levels has 'window'"),
    ('quantize_cfg.reconstruction.per_level.window.iters=1', 'per_level'),
    ('quantize_cfg.pos.mode=twice', "pos.mode='twice'"),
    ('quantize_cfg.pos.modes=off', 'modes'),
    ('quantize_cfg.calibration.method=guess', "calibration.method='guess'"),
    ('quantize_cfg.calibration.image=3', 'calibration.image '),
    ('quantize_cfg.calibration.images=0', 'calibration.images'),
    ('quantize_cfg.calibration.views=0', 'calibration.views'),
    ('quantize_cfg.calibration.cutmix=2', 'calibration.cutmix=2 is not from 0 to 1'),
    ('quantize_cfg.calibration.retargeted=-1', 'calibration.retargeted=-1 is not from 0 to 1'),
    ('quantize_cfg.calibration.retargeted=0.5', 'calibration.retargeted is for classifiers: '),
    ('quantize_cfg.calibration.compensate=0', 'calibration.compensate=0'),
    ('quantize_cfg.calibration.feed_back=often', "calibration.feed_back='often'"),
    ('quantize_cfg.calibration.fit_norms=2', 'calibration.fit_norms=2'),
    ('quantize_cfg.reconstruction.loss=hinge', "loss='hinge'"),
    ('quantize_cfg.reconstruction.iter=3', 'reconstruction.iter '),
    ('quantize_cfg.reconstruction.autocast=half', "autocast='half'"),
    ('quantize_cfg.reconstruction.compile=inductor', "compile='inductor'"),
    ('quantize_cfg.traversal=random', "traversal='random'"),
    ('quantize_cfg.cache_dtype=float12', 'cache_dtype'),
    ('quantize_cfg.cache_memory_mb=much', 'cache_memory_mb'),
    ('quantize_cfg.type=pfcr_mm.NoLoop', 'NoLoop'),
    ('quantize_cfg.level=[leaf]', 'level'),
    ('quantize_hooks.0.type=pfcr_mm.NoHook', 'NoHook'),
    ('model.type=MaskRCNN', 'model.type'),
    ('model.quant.weight_bits.low=4', '--cfg-options'),
    ('model.arch=MaskCNN', 'MaskCNN'),
])
def test_config_key(option, word, refused, tiny_run, tiny_options, tmp_path):
    folder = tmp_path / 'run'
    refused(quant_main, arguments(W4A4, tiny_run.checkpoint, folder, (*tiny_options, option)),
            word)
    assert not (folder / 'quantized.pth').exists()


@pytest.mark.parametrize('override, word', [
    ("dict(pattern='nothing*', weight_bits=8)", 'nothing*'),
    ("dict(pattern='*', weight_bits=1)", 'weight_bits=1'),
    ("dict(pattern='*', bits=4)", "'bits'"),
    ('dict(weight_bits=4)', 'pattern'),
], ids=['no match', 'bits', 'key', 'no pattern'])
def test_override(override, word, refused, tiny_run, tiny_options, tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = '{W4A4}'\nmodel = dict(quant=dict(overrides=[{override}]))\n")
    refused(quant_main, arguments(config, tiny_run.checkpoint, tmp_path, tiny_options), word)


def test_work_dir_is_a_file(refused, tiny_run, tiny_options, tmp_path):
    path = tmp_path / 'file'
    path.write_text('')
    refused(quant_main, arguments(W4A4, tiny_run.checkpoint, path, tiny_options), path)
    assert path.read_text() == ''


@pytest.mark.parametrize('args, word', [
    ([], 'config'),
    ([W4A4, '--cfg-options', 'model'], 'KEY=VALUE'),
    ([W4A4, '--cfg-options', 'quantize_cfg.levels=[leaf,block'], 'brackets'),
    ([W4A4, '--cfg-options', "model.quant={'a':[{'b':'c'},{'d':'e','f':'g'}]}"], 'in a config'),
    ([W4A4, '--bits', 4], '--bits'),
], ids=['nothing', 'no value', 'open bracket', 'dicts in a list', 'unknown flag'])
def test_command_line(args, word, capsys):
    with pytest.raises(SystemExit) as stop:
        quant_main([str(a) for a in args])
    assert stop.value.code == 2
    assert word in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('text, value', [
    ('my data/a b.pth', 'my data/a b.pth'),
    ("'my data/a, b.pth'", 'my data/a, b.pth'),
    ("'plain'", 'plain'),
    ('(old) runs', '(old) runs'),
    (' 3 ', 3),
    ('a, b', ['a', 'b']),
    ("'[a, (1, 2)]'", ['a', (1, 2)]),
], ids=['blanks', 'quoted comma', 'quotes', 'bracket', 'number', 'list', 'quoted list'])
def test_values_of_the_command_line(text, value):
    """Blanks of a path stay; MMEngine takes them away."""
    assert quant_config([str(W4A4), '--cfg-options', f'load_from={text}']).load_from == value


# --- config file ------------------------------------------------------------

def test_config_missing(refused, tmp_path):
    refused(quant_main, [tmp_path / 'mine.py'], tmp_path / 'mine.py')


@pytest.mark.parametrize('text, word', [
    ('model = dict(', 'mine.py'),
    ("_base_ = './nobody.py'", 'nobody.py'),
    ("_base_ = 'mmdet::swin/nobody.py'", 'nobody.py'),
    ('work_dir = undefined_name', 'undefined_name'),
    ('work_dir = "x"', 'model'),
], ids=['syntax', 'base', 'mmdet base', 'name', 'no model'])
def test_config_broken(text, word, refused, tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text(text + '\n')
    refused(quant_main, [config, '--work-dir', tmp_path], word)


def test_coco_missing(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(quant_main, [REPO / 'configs' / 'pfcr_maskrcnn_swin_t_w4a4.py'],
            'data/coco/annotations/instances_val2017.json', 'missing', 'data/coco/',
            'configs/demo/ need no data')
    assert list(tmp_path.iterdir()) == []


# --- checkpoints ------------------------------------------------------------

def test_checkpoint_missing(refused, tiny_options, tmp_path):
    missing = tmp_path / 'nobody.pth'
    refused(quant_main, arguments(W4A4, missing, tmp_path, tiny_options), missing)
    refused(check_main, arguments(W4A4, missing, tmp_path, tiny_options), missing)


def test_checkpoint_truncated(refused, tiny_run, tiny_options, tmp_path):
    for source, main in ((tiny_run.checkpoint, quant_main), (tiny_run.quantized, check_main)):
        content = source.read_bytes()
        cut = tmp_path / f'cut-{source.name}'
        cut.write_bytes(content[:len(content) // 2])
        refused(main, arguments(W4A4, cut, tmp_path, tiny_options), cut)


@pytest.mark.parametrize('content', [b'', b'not a checkpoint'], ids=['empty', 'text'])
def test_checkpoint_is_none(content, refused, tiny_options, tmp_path):
    path = tmp_path / 'text.pth'
    path.write_bytes(content)
    refused(quant_main, arguments(W4A4, path, tmp_path, tiny_options), path)


def test_checkpoint_without_state_dict(refused, tiny_options, tmp_path):
    path = tmp_path / 'numbers.pth'
    torch.save(dict(epoch=3), path)
    refused(quant_main, arguments(W4A4, path, tmp_path, tiny_options), path, 'state dict')


def test_checkpoint_with_code_is_not_run(refused, tiny_options, tmp_path):
    path, trace = tmp_path / 'evil.pth', tmp_path / 'trace'
    torch.save(dict(state_dict={}, meta=_Evil(str(trace))), path)
    refused(quant_main, arguments(W4A4, path, tmp_path, tiny_options), path, '--trust-checkpoint')
    assert not trace.exists()


class _Evil:

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_checkpoint_of_another_architecture(refused, tiny_run, tmp_path):
    wide = (*demo_runs.quick_options(tmp_path / 'shapes'), *demo_runs.QUICK)
    refused(quant_main, arguments(W4A4, tiny_run.checkpoint, tmp_path, wide),
            tiny_run.checkpoint, 'another architecture')
    refused(check_main, arguments(W4A4, tiny_run.quantized, tmp_path, wide),
            tiny_run.quantized, 'another architecture')


def test_quantized_of_another_width(refused, tiny_run, tiny_options, tmp_path):
    """The same layers and bits, other shapes: the manifest alone cannot tell."""
    wide = (*tiny_options, 'model.roi_head.bbox_head.fc_out_channels=48')
    refused(check_main, arguments(W4A4, tiny_run.quantized, tmp_path, wide), tiny_run.quantized)


def test_quantized_with_other_bits(refused, tiny_run, tiny_options, tmp_path):
    other = W4A4.with_name('pfcr_maskrcnn_swin_demo_w3a3.py')
    refused(check_main, arguments(other, tiny_run.quantized, tmp_path, tiny_options),
            tiny_run.quantized, 'bits')


@pytest.mark.parametrize('option', [
    'model.quant.softmax.kind=log_sqrt2', 'model.quant.weight_symmetric=True',
    'model.quant.matmul_granularity=tensor'])
def test_quantized_with_other_quantizers(option, refused, tiny_run, tiny_options, tmp_path):
    """The bits agree, but the codes mean something else."""
    refused(check_main, arguments(W4A4, tiny_run.quantized, tmp_path, (*tiny_options, option)),
            tiny_run.quantized, option.split('.')[2].split('=')[0])


def test_quantized_where_float_is_expected(refused, tiny_run, tiny_options, tmp_path):
    refused(quant_main, arguments(W4A4, tiny_run.quantized, tmp_path / 'run', tiny_options),
            tiny_run.quantized, 'quantized already')
    assert not (tmp_path / 'run' / 'quantized.pth').exists()


def test_float_where_quantized_is_expected(refused, tiny_run, tiny_options, tmp_path):
    refused(check_main, arguments(W4A4, tiny_run.checkpoint, tmp_path, tiny_options),
            tiny_run.checkpoint, 'float')


# --- data -------------------------------------------------------------------

@pytest.fixture()
def user_data(tmp_path, tiny_options):
    """(folder, config, options) of a data set that is the user's own."""
    root = tmp_path / 'mine'
    write_shapes(root, 'train', demo_runs.IMAGES)
    write_shapes(root, 'val', demo_runs.VAL_IMAGES)
    split = '''dict(_delete_=True, type='CocoDataset', data_root='{root}/',
    ann_file='annotations/instances_{split}.json', data_prefix=dict(img='{split}/'),
    metainfo=dict(classes={classes}), test_mode=True, pipeline=_base_.test_pipeline)'''
    train, val = (split.format(root=root, split=s, classes=CLASSES) for s in ('train', 'val'))
    config = tmp_path / 'mine.py'
    config.write_text(
        f"_base_ = '{W4A4}'\n"
        f'train_dataloader = dict(dataset={train})\n'
        f'val_dataloader = dict(dataset={val})\ntest_dataloader = val_dataloader\n'
        f"val_evaluator = dict(ann_file='{root}/annotations/instances_val.json')\n"
        'test_evaluator = val_evaluator\n')
    own = [o for o in tiny_options if '_dataloader.' not in o and '_evaluator.' not in o]
    return root, config, own


def test_user_data_works(user_data, tiny_run, tmp_path):
    _, config, options = user_data
    assert quant_main(arguments(config, tiny_run.checkpoint, tmp_path / 'run', options)) == 0


@pytest.mark.parametrize('split', ['train', 'val'])
def test_annotation_file_missing(split, refused, user_data, tiny_run, tmp_path):
    root, config, options = user_data
    missing = root / 'annotations' / f'instances_{split}.json'
    missing.unlink()
    refused(quant_main, arguments(config, tiny_run.checkpoint, tmp_path / 'run', options),
            missing, 'missing')
    if split == 'val':
        refused(check_main, arguments(config, tiny_run.quantized, tmp_path / 'run', options),
                missing, 'missing')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_annotation_file_damaged(split, refused, user_data, tiny_run, tmp_path):
    root, config, options = user_data
    path = root / 'annotations' / f'instances_{split}.json'
    path.write_text(path.read_text()[:200])
    refused(quant_main, arguments(config, tiny_run.checkpoint, tmp_path / 'run', options), path)


@pytest.mark.parametrize('harm', ['missing', 'cannot be read'])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_image(split, harm, refused, user_data, tiny_run, tmp_path):
    root, config, options = user_data
    path = root / split / '000003.png'
    path.unlink()
    if harm != 'missing':
        path.write_bytes(b'no image')
    refused(quant_main, arguments(config, tiny_run.checkpoint, tmp_path / 'run', options),
            path, harm)
    if split == 'val':
        refused(check_main, arguments(config, tiny_run.quantized, tmp_path / 'run', options),
                path, harm)


def test_calibration_set_empty(refused, user_data, tiny_run, tmp_path):
    root, config, options = user_data
    path = root / 'annotations' / 'instances_train.json'
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(content, images=[], annotations=[])))
    refused(quant_main, arguments(config, tiny_run.checkpoint, tmp_path / 'run', options),
            'calibration set is empty')


# --- as a process -----------------------------------------------------------

@pytest.mark.parametrize('tool', ['quant.py', 'test.py'])
def test_process_ends_with_one_line(tool, tiny_options, tmp_path):
    args = arguments(W4A4, tmp_path / 'nobody.pth', tmp_path / 'run', tiny_options)
    done = run_tool(tool, *args, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and 'nobody.pth' in done.stderr
    assert 'Traceback' not in done.stdout
