"""Files of unknown origin: nothing runs, nothing is believed, nothing silently wrong."""
import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader
from tiny_models import calibrated

from pfcr_mm.errors import UsageError
from pfcr_mm.models.archive import peek
from pfcr_mm.models.checkpoint import (
    check_quantized,
    load_float,
    load_quantized,
    read_checkpoint,
    save_quantized,
)
from pfcr_mm.models.safety import only_weights
from pfcr_mm.reconstruction import harden

QUANT = dict(weight_bits=4, activation_bits=4)


class Malicious:
    """Makes a folder when unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target, )


@pytest.fixture(scope='module')
def saved(build_quantized, images, tmp_path_factory):
    """(detector, quantized.pth) with quantized.safetensors beside it."""
    detector = calibrated(build_quantized(**QUANT), images[:1], 'minmax')
    harden(detector)
    path = tmp_path_factory.mktemp('safety') / 'quantized.pth'
    save_quantized(detector, path, dict(seed=0, dataset_meta=dict(classes=['a', 'b'])))
    return detector, path


@pytest.fixture()
def fresh(build_quantized):
    return build_quantized(seed=5, **QUANT)


# --- nothing runs -----------------------------------------------------------

@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_mmengines_loader_runs_nothing_within_the_block(legacy, tmp_path):
    path = str(tmp_path / 'evil.pth')
    torch.save(dict(state_dict={}, meta=Malicious(tmp_path / 'owned')), path,
               _use_new_zipfile_serialization=not legacy)
    with only_weights(), pytest.raises(UsageError, match='--trust-checkpoint'):
        CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    assert not (tmp_path / 'owned').exists()
    # what MMEngine does by itself: why the block is there
    CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    assert (tmp_path / 'owned').exists()


def test_downloads_of_torch_hub_run_nothing_within_the_block(tmp_path):
    torch.save(dict(state_dict={}, meta=Malicious(tmp_path / 'owned')), tmp_path / 'evil.pth')
    with only_weights(), pytest.raises(UsageError, match='--trust-checkpoint'):
        torch.hub.load_state_dict_from_url('http://nowhere.invalid/evil.pth', str(tmp_path))
    assert not (tmp_path / 'owned').exists()


def test_pretrained_weights_of_a_config_run_nothing(tmp_path):
    from mmengine.model import BaseModule
    torch.save(dict(state_dict={}, meta=Malicious(tmp_path / 'owned')), tmp_path / 'evil.pth')
    module = BaseModule(dict(type='Pretrained', checkpoint=str(tmp_path / 'evil.pth')))
    with only_weights(), pytest.raises(UsageError, match='--trust-checkpoint'):
        module.init_weights()
    assert not (tmp_path / 'owned').exists()


def test_the_block_ends_and_trust_opens_it(tmp_path):
    torch.save(dict(meta=Malicious(tmp_path / 'owned')), tmp_path / 'mine.pth')
    load = torch.load
    with only_weights():
        assert torch.load is not load
    assert torch.load is load
    with only_weights(trust=True):
        torch.load(tmp_path / 'mine.pth', weights_only=False)
    assert (tmp_path / 'owned').exists()


def test_looking_runs_nothing(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.ones(2)), meta=Malicious(tmp_path / 'owned')),
               tmp_path / 'evil.pth')
    found = peek(tmp_path / 'evil.pth')
    assert found['state_dict']['a'].shape == (2, )
    assert not (tmp_path / 'owned').exists()


# --- nothing is believed ----------------------------------------------------

@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_peek_sees_what_is_there_without_its_memory(legacy, tmp_path):
    x = torch.arange(24.).view(4, 6)
    content = dict(state_dict=dict(a=x, b=x[1:3, ::2], c=x.half(), d=torch.nn.Parameter(x),
                                   e=torch.tensor(3), f=torch.zeros(0, 3), g=x.bfloat16(),
                                   h=x.t(), i=x.bool()), meta=dict(epoch=3, name='x'))
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=not legacy)
    found = peek(tmp_path / 'a.pth')
    assert found['meta'] == content['meta']
    for key, value in content['state_dict'].items():
        seen = found['state_dict'][key]
        assert (seen.shape, seen.dtype, seen.is_meta) == (value.shape, value.dtype, True)


def test_a_zip_bomb_is_not_unfolded(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.zeros(1000))), tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as source, zipfile.ZipFile(
            tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(UsageError, match='compressed'):
        read_checkpoint(tmp_path / 'bomb.pth')


def test_entries_that_share_their_bytes_are_counted(tmp_path):
    """Many entries of the directory point to one stored block."""
    torch.save(dict(state_dict=dict(a=torch.zeros(10000))), tmp_path / 'a.pth')
    content = (tmp_path / 'a.pth').read_bytes()
    with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
        start = archive.start_dir
    end = content.rfind(b'PK\x05\x06')
    directory = content[start:content.find(b'PK\x06\x06', start) if b'PK\x06\x06' in
                        content[start:] else end]
    count = struct.unpack('<H', content[end + 10:end + 12])[0]
    tail = struct.pack('<4s4H2LH', b'PK\x05\x06', 0, 0, 50 * count, 50 * count,
                       50 * len(directory), start, 0)
    (tmp_path / 'bomb.pth').write_bytes(content[:start] + directory * 50 + tail)
    with pytest.raises(UsageError, match='more bytes than the file has'):
        read_checkpoint(tmp_path / 'bomb.pth')


def _with_pickle(path, target, change):
    """Copy an archive with another data.pkl, checksums right."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, 'w') as archive:
        for entry in source.infolist():
            data = source.read(entry)
            archive.writestr(entry.filename, change(data) if entry.filename.endswith('data.pkl')
                             else data)


def test_a_storage_of_another_size_than_declared(tmp_path):
    torch.save(dict(a=torch.zeros(1000)), tmp_path / 'a.pth')
    _with_pickle(tmp_path / 'a.pth', tmp_path / 'b.pth',
                 lambda data: data.replace(struct.pack('<H', 1000), struct.pack('<H', 30000)))
    with pytest.raises(UsageError, match='not the size'):
        read_checkpoint(tmp_path / 'b.pth')


def test_a_tensor_beyond_its_storage(tmp_path):
    torch.save(dict(a=torch.zeros(2000)[:1000]), tmp_path / 'a.pth')
    _with_pickle(tmp_path / 'a.pth', tmp_path / 'b.pth',
                 lambda data: data.replace(struct.pack('<H', 1000), struct.pack('<H', 2001)))
    with pytest.raises(UsageError, match='beyond its storage'):
        read_checkpoint(tmp_path / 'b.pth')


def test_a_legacy_file_that_declares_a_terabyte(tmp_path):
    torch.save(dict(a=torch.zeros(1000)), tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    content = (tmp_path / 'a.pth').read_bytes()
    huge = pickle.dumps(2**38, 2)[2:-1]
    changed = content.replace(b'M' + struct.pack('<H', 1000), huge)
    assert changed != content
    (tmp_path / 'b.pth').write_bytes(changed)
    with pytest.raises(UsageError, match='more bytes than the file has'):
        read_checkpoint(tmp_path / 'b.pth')


def test_shapes_are_compared_before_anything_is_allocated(saved, fresh, monkeypatch, tmp_path):
    checkpoint = read_checkpoint(saved[1])
    state = checkpoint['state_dict']
    state['neck.fpn_convs.0.conv.bias'] = torch.zeros(77)
    torch.save(checkpoint, tmp_path / 'q.pth')
    monkeypatch.setattr('pfcr_mm.models.checkpoint.load_weights',
                        lambda *_: pytest.fail('allocated'))
    with pytest.raises(UsageError, match='neck.fpn_convs.0.conv.bias'):
        read_checkpoint(tmp_path / 'q.pth',
                        check=lambda found: check_quantized(fresh, found, 'q.pth'))


@pytest.mark.parametrize('position', [0.2, 0.4, 0.6, 0.8])
def test_one_flipped_bit(position, saved, tmp_path):
    """torch itself would load it."""
    content = bytearray(saved[1].read_bytes())
    content[int(position * len(content))] ^= 4
    (tmp_path / 'q.pth').write_bytes(content)
    with pytest.raises(UsageError, match='q.pth cannot be read'):
        read_checkpoint(tmp_path / 'q.pth')


# --- nothing silently wrong -------------------------------------------------

@pytest.mark.parametrize('key, harm, message', [
    ('neck.fpn_convs.0.conv.bias', lambda v: v.double(), 'not torch.float32'),
    ('neck.fpn_convs.0.conv.weight_packed', lambda v: v.to(torch.int32), 'not torch.uint8'),
    ('neck.fpn_convs.0.conv.weight_packed', lambda v: v[:-1], 'another architecture'),
    ('neck.fpn_convs.0.conv.weight_quantizer.log_scale', lambda v: v * float('nan'), 'NaN'),
    ('neck.fpn_convs.0.conv.input_quantizer.log_scale', lambda v: v * 0 + 100, 'impossible'),
    ('neck.fpn_convs.0.conv.bias', lambda v: v[None], 'another architecture'),
    ('neck.fpn_convs.0.conv.weight_quantizer.zero_point', lambda v: None, 'lacks'),
    ('nobody.weight', lambda v: torch.ones(2), 'nobody.weight'),
], ids=['dtype', 'codes-dtype', 'codes-short', 'nan', 'huge-scale', 'shape', 'missing', 'foreign'])
def test_a_quantized_state_that_is_not_right(key, harm, message, saved, fresh):
    checkpoint = read_checkpoint(saved[1])
    state = checkpoint['state_dict']
    value = harm(state.get(key))
    if value is None:
        del state[key]
    else:
        state[key] = value
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        load_quantized(fresh, checkpoint, 'q.pth')
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


@pytest.mark.parametrize('harm', [
    lambda m: m.pop('layers'), lambda m: m.update(quant=None), lambda m: m.update(layers=[3]),
    lambda m: m['layers'][0].pop('name'), lambda m: m['layers'][0].pop('weight_bits')])
def test_a_damaged_manifest(harm, saved, fresh):
    checkpoint = read_checkpoint(saved[1])
    harm(checkpoint['meta']['pfcr_mm'])
    with pytest.raises(UsageError):
        load_quantized(fresh, checkpoint, 'q.pth')


@pytest.mark.parametrize('value, message', [
    (lambda v: v.long(), 'no float type'), (lambda v: v.to(torch.complex64), 'no float type'),
    (lambda v: v * float('inf'), 'NaN or Inf')], ids=['integers', 'complex', 'inf'])
def test_float_weights_that_are_none(value, message, build_quantized, float_detector):
    state = float_detector.state_dict()
    key = 'neck.fpn_convs.0.conv.weight'
    state[key] = value(state[key])
    with pytest.raises(UsageError, match=f'(?s){key}|{message}'):
        load_float(build_quantized(), dict(state_dict=state), 'f.pth')


# --- safetensors ------------------------------------------------------------

def test_safetensors_hold_the_same(saved, fresh):
    detector, path = saved
    one, other = read_checkpoint(path), read_checkpoint(path.with_suffix('.safetensors'))
    assert one['meta'] == other['meta']
    assert one['state_dict'].keys() == other['state_dict'].keys()
    for key, value in one['state_dict'].items():
        assert torch.equal(value, other['state_dict'][key])
        assert value.dtype == other['state_dict'][key].dtype
    load_quantized(fresh, other, path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fresh.extract_feat(x)[0], detector.extract_feat(x)[0])


def test_safetensors_have_the_same_bytes_each_time(saved, tmp_path):
    detector, path = saved
    save_quantized(detector, tmp_path / 'again.pth',
                   dict(seed=0, dataset_meta=dict(classes=['a', 'b'])))
    assert (tmp_path / 'again.safetensors').read_bytes() == path.with_suffix(
        '.safetensors').read_bytes()


def test_other_programs_read_the_manifest(saved):
    from safetensors import safe_open
    with safe_open(saved[1].with_suffix('.safetensors'), framework='np') as file:
        ours = json.loads(file.metadata()['pfcr_mm'])
    assert ours['meta']['pfcr_mm']['quant']['weight_bits'] == 4


@pytest.mark.parametrize('position', [0.001, 0.02, 0.5, 0.999])
def test_safetensors_with_a_flipped_bit(position, saved, tmp_path):
    content = bytearray(saved[1].with_suffix('.safetensors').read_bytes())
    content[int(position * len(content))] ^= 1
    (tmp_path / 'q.safetensors').write_bytes(content)
    with pytest.raises(UsageError, match='q.safetensors'):
        load = read_checkpoint(tmp_path / 'q.safetensors')
        pytest.fail(f'{len(load)}')


def test_safetensors_of_others_are_float_weights(build_quantized, float_detector, tmp_path):
    from safetensors.torch import save_file
    save_file({k: v.clone().contiguous() for k, v in float_detector.state_dict().items()},
              tmp_path / 'f.safetensors')
    detector = build_quantized(seed=5)
    load_float(detector, read_checkpoint(tmp_path / 'f.safetensors'), 'f.safetensors')
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(detector.extract_feat(x)[0], float_detector.extract_feat(x)[0])


def test_a_file_object_is_safe_too(tmp_path):
    buffer = io.BytesIO()
    torch.save(dict(meta=Malicious(tmp_path / 'owned')), buffer)
    buffer.seek(0)
    with only_weights(), pytest.raises(UsageError):
        torch.load(buffer, weights_only=False)
    assert not (tmp_path / 'owned').exists()
