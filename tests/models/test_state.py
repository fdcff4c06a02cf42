"""The state of a model between two units, at every moment of a run."""
import copy

import pytest
import torch
from tiny_models import calibrated, predict

from pfcr_mm.errors import UsageError
from pfcr_mm.models.reparam import make_channelwise, reparameterise
from pfcr_mm.models.state import load_model_state, model_state
from pfcr_mm.modules import QuantLayer, quantizers_of, set_quantization

QUANT = dict(weight_bits=4, activation_bits=4)


def untouched(detector, images):
    return detector


def channelwise(detector, images):
    make_channelwise(detector)
    return calibrated(detector, images, 'minmax')


def folded(detector, images):
    reparameterise(channelwise(detector, images))
    set_quantization(detector, False, True)  # weight scales are invalid until calibrated again
    return detector


def in_first_stage(detector, images):
    channelwise(detector, images)
    set_quantization(detector, False, True)
    return detector


def with_roundings(detector, images):
    calibrated(detector, images, 'minmax')
    for layer in detector.modules():
        if isinstance(layer, QuantLayer):
            layer.rounding.open(layer.weight, layer.weight_quantizer)
            layer.rounding.close()
    return detector


@pytest.mark.parametrize('moment', [
    untouched, channelwise, folded, in_first_stage, with_roundings], ids=lambda f: f.__name__)
def test_round_trip(moment, build_quantized, images):
    quant = dict(QUANT, rounding='adaround' if moment is with_roundings else 'latent')
    detector = moment(build_quantized(**quant), images[:1])
    fresh = build_quantized(seed=5, **quant)
    load_model_state(fresh, model_state(detector))
    a, b = model_state(detector), model_state(fresh)
    assert a['quantizers'] == b['quantizers'] and a['tensors'].keys() == b['tensors'].keys()
    assert all(torch.equal(v, b['tensors'][k]) for k, v in a['tensors'].items())
    ours, theirs = (predict(d, *images[0]) for d in (fresh, detector))
    assert all(torch.equal(ours[k], theirs[k]) for k in ('bboxes', 'scores', 'masks'))


def test_loading_does_not_share_memory(quantized):
    state = model_state(quantized)
    fresh = copy.deepcopy(quantized)
    load_model_state(fresh, state)
    next(fresh.parameters()).add_(1)
    assert not torch.equal(next(fresh.parameters()), next(quantized.parameters()))


@pytest.mark.parametrize('harm, message', [
    (lambda s: s['tensors'].popitem(), 'lacks'),
    (lambda s: s['tensors'].update({'backbone.norm3.weight': torch.ones(3)}), 'another shape'),
    (lambda s: s['tensors'].update({'nobody.weight': torch.ones(3)}), 'nobody'),
    (lambda s: s['quantizers'].popitem(), 'other quantizers'),
], ids=['tensor', 'shape', 'module', 'quantizer'])
def test_the_state_of_another_model(harm, message, quantized):
    state = model_state(quantized)
    state = dict(tensors=dict(state['tensors']), quantizers=dict(state['quantizers']))
    harm(state)
    with pytest.raises(UsageError, match=message):
        load_model_state(quantized, state)


def test_quantizers_come_back_off_where_they_were_off(quantized, build_quantized):
    set_quantization(quantized, False, True)
    fresh = build_quantized(**QUANT)
    load_model_state(fresh, model_state(quantized))
    for name, quantizer in quantizers_of(fresh):
        assert quantizer.enabled == (not name.endswith('weight_quantizer'))
        assert quantizer.calibrated
