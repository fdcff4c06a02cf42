"""The quantized detector *is* the mmdet detector."""
import copy

import pytest
import torch
from mmdet.models import MaskRCNN
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from tiny_models import predict

from pfcr_mm.models import part_chains
from pfcr_mm.models.fit import MOVED
from pfcr_mm.modules import set_quantization
from pfcr_mm.registry import CHAINS


def test_type_alone_imports_what_it_needs(build_quantized):
    detector = build_quantized()
    assert type(detector) is MaskRCNN
    assert detector.quant_config.weight_bits == 8 and detector.census


@pytest.mark.parametrize('index', range(3), ids=['64x64', '64x96', '96x64'])
def test_off_equals_the_float_detector_bit_for_bit(build_quantized, float_detector, images, index):
    detector = build_quantized(weight_bits=2, activation_bits=2)
    inputs, samples = images[index]
    for ours, theirs in zip(detector.extract_feat(inputs), float_detector.extract_feat(inputs)):
        assert torch.equal(ours, theirs)
    ours, theirs = (predict(d, inputs, samples) for d in (detector, float_detector))
    assert len(ours) > 0
    for key in ('bboxes', 'scores', 'labels', 'masks'):
        assert torch.equal(ours[key], theirs[key])


def test_off_equals_float_in_a_batch(build_quantized, float_detector):
    x = torch.randn(3, 3, 64, 96)
    for ours, theirs in zip(build_quantized().extract_feat(x), float_detector.extract_feat(x)):
        assert torch.equal(ours, theirs)


def test_switched_off_after_calibration_equals_float(quantized, float_detector, images):
    set_quantization(quantized, False, False)
    inputs, samples = images[1]
    ours, theirs = (predict(d, inputs, samples) for d in (quantized, float_detector))
    assert torch.equal(ours.bboxes, theirs.bboxes) and torch.equal(ours.masks, theirs.masks)


def test_on_differs_but_not_wildly(quantized, float_detector, images):
    inputs, _ = images[1]
    for ours, theirs in zip(quantized.extract_feat(inputs), float_detector.extract_feat(inputs)):
        error = (ours - theirs).norm() / theirs.norm()
        assert 0.01 < error < 0.9


def test_float_state_loads_by_name(build_quantized, float_detector):
    detector = build_quantized(seed=7)
    keys = detector.load_state_dict(float_detector.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all(k.endswith((*MOVED, 'reduction.bias')) for k in keys.missing_keys)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(detector.extract_feat(x)[0], float_detector.extract_feat(x)[0])


def test_patch_merging_gets_its_bias_at_build(build_quantized):
    stages = build_quantized().backbone.stages
    assert all(stages[i].downsample.reduction.bias is not None for i in range(3))


def test_part_chains(build_quantized):
    chains, without = part_chains(build_quantized())
    assert list(chains) == ['backbone', 'neck', 'rpn_head', 'roi_head.bbox_head',
                            'roi_head.mask_head']
    assert [c.name for c in chains.values()] == list(chains)
    assert without == {}


@pytest.mark.parametrize('build, reason', [
    (None, 'no chain is registered for FPN'),
    (lambda fpn: None, 'this FPN has layers that its chain does not know'),
], ids=['not registered', 'not known'])
def test_a_part_without_a_chain_says_why(build, reason, build_quantized, monkeypatch):
    find = CHAINS.find
    monkeypatch.setattr(
        CHAINS, 'find', lambda m: build if type(m).__name__ == 'FPN' else find(m))
    chains, without = part_chains(build_quantized())
    assert 'neck' not in chains and without == {'neck': reason}


def test_extra_levels_have_a_chain(tiny_config):
    config = copy.deepcopy(tiny_config)
    config.neck.add_extra_convs = 'on_input'
    arch = config.pop('type')
    detector = MODELS.build(dict(type='pfcr_mm.QuantDetector', arch=arch, quant={}, **config))
    assert 'neck' in part_chains(detector)[0]


def test_a_subclass_with_its_own_forward_has_no_chain(tiny_config):
    config = copy.deepcopy(tiny_config)
    config.neck.type = 'PAFPN'
    arch = config.pop('type')
    detector = MODELS.build(dict(type='pfcr_mm.QuantDetector', arch=arch, quant={}, **config))
    chains, without = part_chains(detector)
    assert 'neck' not in chains and without == {'neck': 'PAFPN has a forward of its own'}


def test_maps_that_roi_align_misreads_are_told_once(build_quantized, caplog, monkeypatch):
    """Features from channels last are others, whatever else is equal: that is mmcv's doing."""
    detector = build_quantized()
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [caplog.handler])
    extractor = detector.roi_head.bbox_roi_extractor
    maps = detector.extract_feat(torch.randn(1, 3, 64, 64))[:4]
    assert all(m.is_contiguous() for m in maps)
    boxes = torch.tensor([[0, 3., 5, 30, 40]])
    plain = extractor(maps, boxes)
    assert not caplog.messages
    for _ in range(2):
        turned = extractor([m.to(memory_format=torch.channels_last) for m in maps], boxes)
    assert not torch.allclose(turned, plain, rtol=0.1)
    assert len([m for m in caplog.messages if 'channels last' in m]) == 1
