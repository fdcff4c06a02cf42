"""Damaged checkpoints: refused in one line, or loaded to the same bits."""
import copy
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import STATE, harm
from tiny_models import calibrated

from pfcr_mm.engine.resume import RunCheckpoints, read_run
from pfcr_mm.errors import UsageError
from pfcr_mm.models.checkpoint import (
    check_float,
    check_quantized,
    load_float,
    load_quantized,
    read_checkpoint,
    save_quantized,
)
from pfcr_mm.models.fit import MOVED
from pfcr_mm.models.state import model_state
from pfcr_mm.reconstruction import harden

from .conftest import EXAMPLES, Drawn, examples

QUANT = dict(weight_bits=4, activation_bits=4)
KINDS = ('float.pth', 'quantized.pth', 'quantized.safetensors', '000001.pth')


@pytest.fixture(scope='module')
def files(build_quantized, float_detector_state, images, tmp_path_factory):
    """A folder with one file of each kind, and a detector to load them into."""
    folder = tmp_path_factory.mktemp('damage')
    detector = build_quantized(**QUANT)
    torch.save(dict(meta={}, state_dict=float_detector_state), folder / 'float.pth')
    calibrated(detector, images[:1], 'minmax')
    checkpoints = RunCheckpoints(folder)
    checkpoints.save(dict(model=model_state(detector), notes=['a'], records=[]))
    (folder / 'resume' / '000001.pth').rename(folder / '000001.pth')
    harden(detector)
    save_quantized(detector, folder / 'quantized.pth', dict(seed=0))
    return folder, build_quantized(seed=5, **QUANT)


@pytest.fixture(scope='module')
def float_detector_state(build_quantized):
    state = build_quantized(**QUANT).state_dict()
    return {k: v for k, v in state.items() if not k.endswith((*MOVED, 'reduction.bias'))}


def load(path, kind, detector):
    """Everything that a file of this kind holds, as it arrives; or UsageError."""
    if kind == '000001.pth':
        return _flat(read_run(path))
    detector = copy.deepcopy(detector)
    check, into = (check_float, load_float) if kind == 'float.pth' else (
        check_quantized, load_quantized)
    into(detector, read_checkpoint(path, check=lambda found: check(detector, found, path)), path)
    return _flat(model_state(detector))


def _flat(value, key=''):
    if isinstance(value, dict):
        return {k: v for name, child in value.items()
                for k, v in _flat(child, f'{key}.{name}').items()}
    return {key: value}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) if torch.is_tensor(v) else v == other[k] for k, v in one.items())


@st.composite
def harms(draw, kinds=KINDS):
    """(kind of file, name of the damage, function of bytes)."""
    return harm(kinds, Drawn(draw))


def test_damaged_files(files, tmp_path):
    folder, detector = files
    whole = {kind: load(folder / kind, kind, detector) for kind in KINDS}
    found = Counter()

    @examples(60)
    @given(harms())
    def check(drawn):
        kind, name, damage = drawn
        content = (folder / kind).read_bytes()
        path = tmp_path / kind
        path.write_bytes(damage(content))
        if path.read_bytes() == content:
            return
        if kind == '000001.pth' and name in STATE:
            return _check_state(path, detector, found)
        try:
            arrived = load(path, kind, detector)
        except UsageError as error:
            assert '\n' not in str(error) and str(path) in str(error), str(error)
            found['refused'] += 1
        else:
            assert same(arrived, whole[kind]), (kind, name)
            found['loaded to the same bits'] += 1

    check()
    assert found['refused'] > 20
    if EXAMPLES:
        print(f'\ndamaged checkpoints: {dict(found)}')


def _check_state(path, detector, found):
    """A run's checkpoint that is whole and holds another model's state."""
    from pfcr_mm.models.state import load_model_state
    model = copy.deepcopy(detector)
    with pytest.raises(UsageError):
        load_model_state(model, read_run(path)['model'])
    found['refused'] += 1
