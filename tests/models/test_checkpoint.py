"""Checkpoints: packed, small, exact, and safe to read."""
import copy
import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import load_checkpoint
from tiny_models import calibrated, predict

from pfcr_mm.errors import UsageError
from pfcr_mm.models.checkpoint import (
    check_manifest,
    load_float,
    load_quantized,
    manifest_of,
    read_checkpoint,
    save_quantized,
)
from pfcr_mm.models.manifest import build_manifest
from pfcr_mm.modules import QuantLayer, set_quantization
from pfcr_mm.reconstruction import calibrate, harden, observe


@pytest.fixture(scope='module')
def saved(build_quantized, images, tmp_path_factory):
    """(detector, file) of a hardened, saved W4A4 detector."""
    detector = calibrated(build_quantized(weight_bits=4, activation_bits=4), images)
    set_quantization(detector, True, True)
    harden(detector)
    path = tmp_path_factory.mktemp('checkpoint') / 'quantized.pth'
    assert save_quantized(detector, path, dict(seed=0)) == path.stat().st_size
    return detector, path


@pytest.fixture()
def float_file(float_detector, tmp_path):
    path = tmp_path / 'float.pth'
    torch.save(dict(meta=dict(epoch=1), state_dict=float_detector.state_dict()), path)
    return path


def assert_same_outputs(detector, expected, images):
    for inputs, samples in images:
        ours, theirs = (predict(d, inputs, samples) for d in (detector, expected))
        for key in ('bboxes', 'scores', 'labels', 'masks'):
            assert torch.equal(ours[key], theirs[key])
        for a, b in zip(detector.extract_feat(inputs), expected.extract_feat(inputs)):
            assert torch.equal(a, b)


# --- round trips -------------------------------------------------------------

def test_quantized_round_trip_is_bit_identical(saved, build_quantized, images):
    detector, path = saved
    fresh = build_quantized(seed=5, weight_bits=4, activation_bits=4)
    load_quantized(fresh, read_checkpoint(path), path)
    assert_same_outputs(fresh, detector, images)


def test_plain_mmengine_loader_reads_it(saved, build_quantized, images):
    detector, path = saved
    fresh = build_quantized(seed=5, weight_bits=4, activation_bits=4)
    load_checkpoint(fresh, str(path), map_location='cpu')
    assert_same_outputs(fresh, detector, images)


@pytest.mark.parametrize('bits', [2, 3, 8])
def test_round_trip_at_other_bits(build_quantized, images, tmp_path, bits):
    quant = dict(weight_bits=bits, activation_bits=bits, first_last_bits=None,
                 overrides=[dict(pattern='neck.*', weight_bits=5)],
                 exclude=['rpn_head.rpn_conv'])
    detector = calibrated(build_quantized(**quant), images[:1], 'minmax')
    harden(detector)
    save_quantized(detector, tmp_path / 'q.pth', {})
    fresh = build_quantized(seed=5, **quant)
    load_quantized(fresh, read_checkpoint(tmp_path / 'q.pth'), 'q.pth')
    assert_same_outputs(fresh, detector, images[:1])


def test_saving_again_gives_the_same_state(saved, build_quantized, tmp_path):
    _, path = saved
    fresh = build_quantized(seed=5, weight_bits=4, activation_bits=4)
    load_quantized(fresh, read_checkpoint(path), path)
    save_quantized(fresh, tmp_path / 'again.pth', dict(seed=0))
    first, second = read_checkpoint(path), read_checkpoint(tmp_path / 'again.pth')
    assert first['meta'] == second['meta']
    assert first['state_dict'].keys() == second['state_dict'].keys()
    assert all(torch.equal(v, second['state_dict'][k]) for k, v in first['state_dict'].items())


def test_a_layer_that_no_data_reached_stays_float_on_its_input(build_quantized, tmp_path):
    detector = build_quantized(weight_bits=4, activation_bits=4)
    with observe(detector) as seen:
        detector.extract_feat(torch.randn(1, 3, 64, 64))  # heads see nothing
    unreached = calibrate(detector, seen, 'minmax')
    assert 'roi_head.mask_head.conv_logits' in unreached
    set_quantization(detector, True, True)
    harden(detector)
    save_quantized(detector, tmp_path / 'q.pth', {})
    checkpoint = read_checkpoint(tmp_path / 'q.pth')
    layers = {layer['name']: layer for layer in manifest_of(checkpoint)['layers']}
    assert layers['rpn_head.rpn_conv']['skipped_reason'] == 'no calibration data reached it'
    assert layers['neck.fpn_convs.0.conv']['skipped_reason'] is None
    fresh = build_quantized(seed=5, weight_bits=4, activation_bits=4)
    load_quantized(fresh, checkpoint, 'q.pth')
    maps = detector.extract_feat(torch.ones(1, 3, 64, 64))
    for a, b in zip(fresh.rpn_head(maps)[0], detector.rpn_head(maps)[0]):
        assert torch.equal(a, b)


def test_file_size_is_that_of_its_numbers(build_quantized, demo_config, images, tmp_path):
    """Weights at their bits, 4 bytes for every other number (scales included)."""
    detector = build_quantized(demo_config, weight_bits=4, activation_bits=4)
    calibrated(detector, images[:1], 'minmax')
    harden(detector)
    size = save_quantized(detector, tmp_path / 'q.pth', {})
    layers = [m for m in detector.modules() if isinstance(m, QuantLayer)]
    packed = sum(m.weight.numel() * m.weight_quantizer.bits / 8 for m in layers)
    numbers = sum(v.numel() for k, v in detector.state_dict().items()
                  if 'relative_position_index' not in k)
    rest = numbers - sum(m.weight.numel() for m in layers)
    assert packed > 5 * rest  # else this says nothing about packing
    assert size == pytest.approx(packed + 4 * rest, rel=0.03)
    assert size < 0.25 * os.path.getsize(_save_float(detector, tmp_path))


def _save_float(detector, folder):
    torch.save(dict(state_dict=detector.state_dict()), folder / 'float.pth')
    return folder / 'float.pth'


def test_nothing_is_left_behind_when_saving_fails(saved, tmp_path):
    detector, _ = saved
    target = tmp_path / 'q.pth'
    target.write_bytes(b'old')
    with pytest.raises(Exception):  # noqa: B017  whatever pickle says
        save_quantized(detector, target, dict(bad=lambda: 0))
    assert target.read_bytes() == b'old' and list(tmp_path.iterdir()) == [target]


def test_manifest_is_plain_data(saved):
    detector, path = saved
    manifest = manifest_of(torch.load(path, weights_only=True))
    assert manifest['format'].startswith('pfcr_mm.quantized/')
    assert manifest['quant']['weight_bits'] == 4
    assert {layer['name'] for layer in manifest['layers']} == {r.name for r in detector.census}


def test_codes_have_their_bit_width(saved):
    detector, path = saved
    state = read_checkpoint(path)['state_dict']
    layer = detector.backbone.stages[0].blocks[0].attn.w_msa.qkv
    packed = state['backbone.stages.0.blocks.0.attn.w_msa.qkv.weight_packed']
    assert packed.dtype == torch.uint8 and packed.numel() == layer.weight.numel() // 2
    assert not any(
        f'{name}.weight' in state for name, m in detector.named_modules()
        if isinstance(m, QuantLayer))


# --- loading the right thing ---------------------------------------------------

def test_float_loads(build_quantized, float_detector, float_file, images):
    detector = build_quantized(seed=5)
    load_float(detector, read_checkpoint(float_file), float_file)
    assert_same_outputs(detector, float_detector, images[:1])


@pytest.mark.parametrize('wrap', [
    lambda state: state, lambda state: dict(state_dict={f'module.{k}': v
                                                        for k, v in state.items()})],
    ids=['bare-state-dict', 'data-parallel'])
def test_other_forms_of_float_files_load(build_quantized, float_detector, tmp_path, wrap):
    torch.save(wrap(float_detector.state_dict()), tmp_path / 'f.pth')
    detector = build_quantized(seed=5)
    load_float(detector, read_checkpoint(tmp_path / 'f.pth'), 'f.pth')
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(detector.extract_feat(x)[0], float_detector.extract_feat(x)[0])


def test_quantized_where_float_is_expected(saved, build_quantized):
    _, path = saved
    with pytest.raises(UsageError, match=f'{path} is quantized already'):
        load_float(build_quantized(), read_checkpoint(path), path)


def test_float_where_quantized_is_expected(build_quantized, float_file):
    with pytest.raises(UsageError, match=f'{float_file} holds float weights'):
        load_quantized(build_quantized(), read_checkpoint(float_file), float_file)


def test_float_of_another_architecture(build_quantized, float_file, demo_config):
    with pytest.raises(UsageError, match='for another architecture'):
        load_float(build_quantized(demo_config), read_checkpoint(float_file), float_file)


def test_float_that_lacks_weights(build_quantized, float_detector):
    state = float_detector.state_dict()
    del state['neck.fpn_convs.0.conv.weight']
    with pytest.raises(UsageError, match="lacks 1 weights, such as 'neck.fpn_convs.0.conv.weight'"):
        load_float(build_quantized(), dict(state_dict=state), 'f.pth')


def test_float_of_a_deeper_model(build_quantized, float_detector):
    state = float_detector.state_dict()
    state['backbone.stages.3.blocks.9.norm1.weight'] = torch.ones(1)
    with pytest.raises(UsageError, match='the config does not make'):
        load_float(build_quantized(), dict(state_dict=state), 'f.pth')


def test_float_without_a_bias_that_it_should_have(build_quantized, float_detector):
    state = float_detector.state_dict()
    del state['backbone.stages.0.blocks.0.attn.w_msa.qkv.bias']
    with pytest.raises(UsageError, match='lacks 1 weights'):
        load_float(build_quantized(), dict(state_dict=state), 'f.pth')


def test_quantized_that_lacks_a_tensor(saved, build_quantized):
    checkpoint = read_checkpoint(saved[1])
    del checkpoint['state_dict']['neck.fpn_convs.0.conv.bias']
    with pytest.raises(UsageError, match='lacks .neck.fpn_convs.0.conv.bias'):
        load_quantized(build_quantized(weight_bits=4, activation_bits=4), checkpoint, 'q.pth')


@pytest.mark.parametrize('quant, message', [
    (dict(weight_bits=3, activation_bits=4), 'weight_bits=4 for .*the config says 3'),
    (dict(weight_bits=4, activation_bits=6), 'activation_bits=4 for .*the config says 6'),
    (dict(weight_bits=4, activation_bits=4, exclude=['neck.*']), 'neck.*the config says None'),
], ids=['weight-bits', 'activation-bits', 'excluded'])
def test_quantized_with_another_config(saved, build_quantized, quant, message):
    _, path = saved
    detector = build_quantized(**quant)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        load_quantized(detector, read_checkpoint(path), path)
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


def test_quantized_by_other_defaults(build_quantized, tmp_path):
    """8 bits once had log2 for attention weights where the config said nothing."""
    detector = build_quantized(softmax=dict(kind='log2'))
    with pytest.raises(UsageError, match=r"or say model\.quant\.softmax\.kind=log2$"):
        check_manifest(build_quantized(), build_manifest(detector), 'q.pth')
    check_manifest(build_quantized(softmax=dict(kind='log2')), build_manifest(detector))


def test_quantized_of_another_architecture(saved, build_quantized, demo_config):
    _, path = saved
    with pytest.raises(UsageError, match='another architecture'):
        load_quantized(build_quantized(demo_config, weight_bits=4, activation_bits=4),
                       read_checkpoint(path), path)


def test_quantized_of_another_width(saved, build_quantized, tiny_config):
    """The same layers, other shapes: the manifest alone does not tell them apart."""
    _, path = saved
    config = copy.deepcopy(tiny_config)
    config.roi_head.bbox_head.fc_out_channels = 48
    with pytest.raises(UsageError):
        load_quantized(build_quantized(config, weight_bits=4, activation_bits=4),
                       read_checkpoint(path), path)


def test_another_format_version(saved):
    checkpoint = read_checkpoint(saved[1])
    checkpoint['meta']['pfcr_mm']['format'] = 'pfcr_mm.quantized/99'
    with pytest.raises(UsageError, match='written by another version'):
        manifest_of(checkpoint)


# --- reading -------------------------------------------------------------------

def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match='nowhere.pth is not there'):
        read_checkpoint(tmp_path / 'nowhere.pth')


def test_missing_asset():
    with pytest.raises(UsageError, match='is not there'):
        read_checkpoint('pfcr_mm://nowhere.pth')


@pytest.mark.parametrize('share', [0.0, 0.5, 0.99])
def test_truncated_file(saved, tmp_path, share):
    content = saved[1].read_bytes()
    file = tmp_path / 'cut.pth'
    file.write_bytes(content[:int(len(content) * share)])
    with pytest.raises(UsageError, match='cut.pth cannot be read') as caught:
        read_checkpoint(file)
    assert '\n' not in str(caught.value)


def test_not_a_checkpoint(tmp_path):
    (tmp_path / 'a.pth').write_text('hello, I am a text file')
    torch.save([1, 2], tmp_path / 'b.pth')
    torch.save(dict(meta={}), tmp_path / 'c.pth')
    with pytest.raises(UsageError, match='a.pth'):
        read_checkpoint(tmp_path / 'a.pth')
    for name in ('b.pth', 'c.pth'):
        with pytest.raises(UsageError, match='holds no state dict'):
            read_checkpoint(tmp_path / name)


class Malicious:
    """Runs a command when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target), )


@pytest.mark.parametrize('form', ['torch', 'pickle'])
def test_a_malicious_pickle_is_not_executed(tmp_path, form):
    target = tmp_path / 'owned'
    content = dict(state_dict={}, meta=Malicious(target))
    if form == 'torch':
        torch.save(content, tmp_path / 'evil.pth')
    else:
        (tmp_path / 'evil.pth').write_bytes(pickle.dumps(content))
    with pytest.raises(UsageError, match='evil.pth'):
        read_checkpoint(tmp_path / 'evil.pth')
    assert not target.exists()
    if form == 'torch':  # the file does what it says once pickle is allowed
        read_checkpoint(tmp_path / 'evil.pth', trust=True)
        assert target.exists()


class Getter:
    """Looks an attribute up when unpickled."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_getattr_reaches_no_further_than_history_buffers(tmp_path):
    torch.save(dict(state_dict={}, meta=Getter(HistoryBuffer, '__init__')), tmp_path / 'a.pth')
    with pytest.raises(UsageError):
        read_checkpoint(tmp_path / 'a.pth')


def test_training_checkpoints_of_mmengine_load_without_pickle(float_detector, tmp_path):
    hub = MessageHub('test_checkpoint')
    hub.update_scalar('train/loss', 1.5)
    hub.update_scalar('train/lr', np.float64(0.1))
    torch.save(dict(state_dict=float_detector.state_dict(), message_hub=hub.state_dict()),
               tmp_path / 'epoch_1.pth')
    checkpoint = read_checkpoint(tmp_path / 'epoch_1.pth')
    assert checkpoint['state_dict'].keys() == float_detector.state_dict().keys()
