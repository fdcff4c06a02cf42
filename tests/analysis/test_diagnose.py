"""Comparing models: facts that must hold, and that nothing of the models changes."""
import copy

import pytest
import torch
from tiny_classifiers import build_classifier, pictures
from tiny_models import calibrated

from pfcr_mm.analysis.diagnose import compare_models
from pfcr_mm.analysis.layers import weight_facts
from pfcr_mm.analysis.propagation import common_boxes, propagation
from pfcr_mm.analysis.twins import align
from pfcr_mm.models import reparameterise
from pfcr_mm.models.reparam import make_channelwise
from pfcr_mm.modules import QuantLinear, quantizers_of, set_quantization


def state_of(model):
    return ({k: v.clone() for k, v in model.state_dict().items()},
            [(n, q.enabled) for n, q in quantizers_of(model)],
            [len(m._forward_hooks) for m in model.modules()], [m.training for m in model.modules()])


def same(one, two):
    return one[1:] == two[1:] and one[0].keys() == two[0].keys() and all(
        torch.equal(v, two[0][k]) for k, v in one[0].items())


def test_a_comparison_leaves_models_and_random_numbers_alone(quantized, twin, images):
    before, numbers = state_of(quantized), torch.get_rng_state()
    copied = copy.deepcopy(images)
    found, material = compare_models(images, quantized, twin, copy.deepcopy(quantized))
    assert same(before, state_of(quantized)) and torch.equal(numbers, torch.get_rng_state())
    assert [s[0].keys() for _, s in images] == [s[0].keys() for _, s in copied]
    assert {p['part'] for p in found['propagation']} == {
        'backbone', 'neck', 'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head'}
    assert len(found['disagreements']) == len(material.pairs) == len(images)
    # the calibrated model given is the quantized one
    assert all(p['calibrated'] == p['quantized'] for p in found['propagation'])


def test_nothing_is_lost_without_quantization(quantized, twin, images):
    set_quantization(quantized, False, False)
    found, _ = compare_models(images, quantized, twin)
    assert all(p['quantized'] is None for p in found['propagation'])
    assert all(e['sqnr_db'] is None for e in found['layers'])
    assert all(h['entropy'] == pytest.approx(h['float_entropy']) for h in found['attention'])
    assert all(d['disagreement'] == 0 for d in found['disagreements'])


def test_more_bits_less_noise(build_quantized, images):
    sqnr = []
    for bits in (4, 8):
        model = calibrated(build_quantized(
            weight_bits=bits, activation_bits=bits, first_last_bits=None), images)
        floating = copy.deepcopy(model)
        set_quantization(floating, False, False)
        points = propagation(floating, model, images, common_boxes(floating, images))
        sqnr.append([p['sqnr_db'] for p in points])
    assert all(few < many for few, many in zip(*sqnr))
    assert len(sqnr[0]) > 30


def test_a_twin_is_folded_alike(build_quantized, images):
    """Post-norm activations of twins agree once the fold is read off, and outputs do not move."""
    model = build_quantized(weight_bits=8, activation_bits=8)
    make_channelwise(model)
    calibrated(model, images)
    floating = build_quantized(weight_bits=8, activation_bits=8)
    inputs, samples = images[0]
    before = floating.extract_feat(inputs)
    assert reparameterise(model)
    align(floating, model)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(
        before, floating.extract_feat(inputs)))
    for ours, theirs in zip(floating.modules(), model.modules()):
        if isinstance(ours, torch.nn.LayerNorm):
            assert torch.allclose(ours.weight, theirs.weight, rtol=1e-4)
            assert torch.allclose(ours.bias, theirs.bias, rtol=1e-3, atol=1e-4)


def test_weight_facts_by_hand():
    layer = QuantLinear.from_float(torch.nn.Linear(2, 2), 2, 8)
    layer.weight_quantizer.set_scale(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 1.0]))
    layer.weight_quantizer.enabled = True
    floating = torch.tensor([[0.2, 0.9], [-0.4, 0.1]])  # nearest 0, 1, -0.5, 0
    layer.set_codes(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))  # 0, 1, 0.5, 0
    facts = weight_facts(layer, floating)
    assert facts['flipped'] == 0.25 and facts['moved'] == 0.25
    assert facts['scale_spread'] == pytest.approx(2.0)
    assert facts['levels_used'] == pytest.approx(0.5)  # each channel two of four
    error = 0.2**2 + 0.1**2 + 0.9**2 + 0.1**2
    assert facts['weight_sqnr_db'] == pytest.approx(
        10 * torch.tensor(1.02 / error).log10().item(), abs=1e-4)


@pytest.mark.parametrize('kind', ['vit', 'swin'])
def test_classifiers(kind):
    from mmengine.structures import BaseDataElement
    model = build_classifier(kind, weight_bits=4, activation_bits=4)
    given = [(x[None], [BaseDataElement(metainfo=dict(img_path=f'/x/{i}.png'))])
             for i, x in enumerate(pictures(kind, 2))]
    from pfcr_mm.reconstruction import calibrate, observe
    with observe(model, 64) as seen:
        for inputs, _ in given:
            model(inputs)
    calibrate(model, seen, 'minmax')
    set_quantization(model, True, True)
    floating = copy.deepcopy(model)
    set_quantization(floating, False, False)
    found, material = compare_models(given, model, floating)
    assert found['images'] == ['0.png', '1.png'] and material.pairs == []
    assert 0 <= found['agreement']['same_class'] <= 1 and found['disagreements'] == []
    assert {p['part'] for p in found['propagation']} == {'backbone'} and found['attention']
    assert {'post-LN', 'post-GELU', 'softmax'} <= {e['role'] for e in found['activations']}
