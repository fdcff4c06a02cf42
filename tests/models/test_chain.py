"""Running a chain's leaves is running the part."""
import pytest
import torch
from mmdet.structures.bbox import bbox2roi

from pfcr_mm.models import State, part_chains
from pfcr_mm.modules import QuantLayer


@pytest.fixture(params=['off', 'on'])
def detector(request, build_quantized, quantized):
    return quantized if request.param == 'on' else build_quantized()


@pytest.fixture(params=range(3), ids=['64x64', '64x96', '96x64'])
def inputs(request, images):
    return images[request.param][0]


def chain_of(detector, name):
    return part_chains(detector)[0][name]


def test_backbone(detector, inputs):
    state, side = chain_of(detector, 'backbone').run(State((inputs, )))
    maps = detector.backbone(inputs)
    assert state.tensors == () and len(side) == len(maps) == 4
    for tokens, expected in zip(side, maps):
        assert torch.equal(tokens.transpose(1, 2).reshape(expected.shape), expected)


def test_backbone_in_a_batch(detector):
    inputs = torch.randn(2, 3, 64, 96)
    _, side = chain_of(detector, 'backbone').run(State((inputs, )))
    for tokens, expected in zip(side, detector.backbone(inputs)):
        assert torch.equal(tokens.transpose(1, 2).reshape(expected.shape), expected)


def test_neck(detector, inputs):
    maps = detector.backbone(inputs)
    state, side = chain_of(detector, 'neck').run(State(tuple(maps)))
    expected = detector.neck(maps)
    assert side == () and len(state.tensors) == len(expected) == 5
    assert all(torch.equal(a, b) for a, b in zip(state.tensors, expected))


def test_rpn_head(detector, inputs):
    maps = detector.extract_feat(inputs)
    state, _ = chain_of(detector, 'rpn_head').run(State(maps))
    scores, deltas = detector.rpn_head(maps)
    assert len(state.tensors) == 10
    assert all(torch.equal(a, b) for a, b in zip(state.tensors, [*scores, *deltas]))


def roi_features(detector, inputs, extractor):
    maps = detector.extract_feat(inputs)
    boxes = torch.tensor([[0., 0, 30, 40], [10, 5, 60, 60], [3, 3, 9, 9]])
    return getattr(detector.roi_head, extractor)(maps[:4], bbox2roi([boxes]))


def test_bbox_head(detector, inputs):
    rois = roi_features(detector, inputs, 'bbox_roi_extractor')
    state, _ = chain_of(detector, 'roi_head.bbox_head').run(State((rois, )))
    expected = detector.roi_head.bbox_head(rois)
    assert len(state.tensors) == 2
    assert all(torch.equal(a, b) for a, b in zip(state.tensors, expected))


def test_mask_head(detector, inputs):
    rois = roi_features(detector, inputs, 'mask_roi_extractor')
    state, _ = chain_of(detector, 'roi_head.mask_head').run(State((rois, )))
    assert torch.equal(state.tensors[0], detector.roi_head.mask_head(rois))


@pytest.mark.parametrize('name', ['roi_head.bbox_head', 'roi_head.mask_head'])
def test_heads_take_no_rois(quantized, name):
    size = 7 if 'bbox' in name else 14
    state, _ = chain_of(quantized, name).run(State((torch.zeros(0, 16, size, size), )))
    assert all(t.shape[0] == 0 for t in state.tensors)


def test_running_in_two_parts_is_running_at_once(quantized, inputs):
    chain = chain_of(quantized, 'backbone')
    whole, side = chain.run(State((inputs, )))
    for cut in (1, 4, 9):
        state, first = chain.run(State((inputs, )), 0, cut)
        state, second = chain.run(state, cut)
        assert state.meta == whole.meta
        assert all(torch.equal(a, b) for a, b in zip(first + second, side))


def test_leaves_own_every_quantized_layer_once(quantized):
    owned = [
        id(m) for chain in part_chains(quantized)[0].values() for leaf in chain.leaves
        for root in leaf.modules for m in root.modules() if isinstance(m, QuantLayer)
    ]
    layers = [id(m) for m in quantized.modules() if isinstance(m, QuantLayer)]
    assert sorted(owned) == sorted(layers)


def test_leaves_of_the_backbone(quantized):
    chain = chain_of(quantized, 'backbone')
    assert ''.join(leaf.letter for leaf in chain.leaves) == 'EAMAMDAMAMDAMAMDAMAMN'
    assert chain.leaves[1].name == 'stages.0.blocks.0.attn'
    assert [leaf.block for leaf in chain.leaves if leaf.letter == 'A'] == list(range(8))
