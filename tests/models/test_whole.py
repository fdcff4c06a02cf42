"""The chain of a whole detector: what it gives is what mmdet's own heads give."""
import copy

import pytest
import tiny_cascade
import torch
from mmdet.models.roi_heads import BaseRoIExtractor
from mmdet.structures.bbox import bbox2roi

from pfcr_mm.errors import UsageError
from pfcr_mm.models import State, part_chains, whole_chain
from pfcr_mm.models.whole import padded, roi_parts

BOXES = torch.tensor([[4., 6, 40, 50], [10, 2, 30, 60], [0, 0, 63, 63]])


@pytest.fixture(scope='module', params=['mask', 'cascade'])
def detector(request, build_quantized):
    if request.param == 'cascade':
        return tiny_cascade.build_quantized(tiny_cascade.build_float().state_dict())
    return build_quantized(weight_bits=4, activation_bits=4)


def chain_of(detector):
    return whole_chain(detector, part_chains(detector)[0])


def state_of(detector, inputs, found, count=4):
    return State((inputs, *(padded(found, count) for _ in roi_parts(detector))))


def test_boxes_are_padded():
    found = padded(BOXES, 5)
    assert found.shape == (1, 5, 5)
    assert torch.equal(found[0, :3, :4], BOXES)
    assert found[0, :, 4].tolist() == [1, 1, 1, 0, 0]
    assert padded(BOXES[:0], 2).tolist() == [[[0.0] * 5] * 2]


@torch.no_grad()
def test_predictions_are_those_of_the_heads(detector, images):
    inputs, _ = images[0]
    chain = chain_of(detector)
    state, side = chain.run(state_of(detector, inputs, BOXES))
    assert side == () and len(chain.kinds) == len(state.tensors)
    outputs = list(zip(chain.kinds, state.tensors))

    maps = detector.extract_feat(inputs)
    scores, deltas = detector.rpn_head(maps)
    expected = ([('dense_scores', x) for x in scores] + [('dense_deltas', x) for x in deltas])
    present = torch.tensor([[1., 1, 1, 0]])
    rois = bbox2roi([torch.cat([BOXES, torch.zeros(1, 4)])])
    head = detector.roi_head
    for part in roi_parts(detector):
        stage = (int(part[-1]), ) if part[-1].isdigit() else ()
        forward = head._bbox_forward if 'bbox_head' in part else head._mask_forward
        found = forward(*stage, maps, rois)
        names = (dict(scores='cls_score', deltas='bbox_pred') if 'bbox_head' in part
                 else dict(masks='mask_preds'))
        expected += [('present', present)]
        expected += [(kind, found[name][None]) for kind, name in names.items()]
    assert [kind for kind, _ in outputs] == [kind for kind, _ in expected]
    for (kind, ours), (_, theirs) in zip(outputs, expected):
        torch.testing.assert_close(ours, theirs, msg=kind)


@torch.no_grad()
def test_a_batch_is_its_images(detector, images):
    inputs = images[0][0]
    states = [state_of(detector, x, BOXES[:k]) for x, k in ((inputs, 3), (inputs.flip(3), 0))]
    both = State(tuple(torch.cat(column) for column in zip(*(s.tensors for s in states))))
    chain = chain_of(detector)
    own = [chain.run(state)[0].tensors for state in states]
    for got, *apart in zip(chain.run(both)[0].tensors, *own):
        torch.testing.assert_close(got, torch.cat(apart), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_boxes_are_exact_in_half_precision(detector, images, monkeypatch):
    """RoIAlign takes no bfloat16, and boxes would be rounded to those of the maps."""
    seen = []
    for extractor in detector.modules():
        if isinstance(extractor, BaseRoIExtractor):
            monkeypatch.setattr(extractor, 'forward', lambda maps, rois, f=extractor.forward: (
                seen.append((maps[0].dtype, rois)), f(maps, rois))[1])
    boxes = BOXES + 0.3
    with torch.autocast('cpu', torch.bfloat16):
        state, _ = chain_of(detector).run(state_of(detector, images[0][0], boxes, count=3))
    assert len(seen) == len(roi_parts(detector)) and torch.bfloat16 in {
        t.dtype for t in state.tensors}
    for dtype, rois in seen:
        assert dtype == torch.float32 and torch.equal(rois[:, 1:], boxes)


def test_it_owns_every_layer(detector):
    owned = {id(p) for leaf in chain_of(detector).leaves for m in leaf.modules
             for p in m.parameters()}
    assert owned == {id(p) for p in detector.parameters()}


@pytest.mark.parametrize('spoil, says', [
    (lambda d, c: setattr(d.rpn_head, 'use_sigmoid_cls', False), 'its RPN has a softmax'),
    (lambda d, c: c.pop('roi_head.mask_head'), 'its roi_head.mask_head is not'),
    (lambda d, c: setattr(d.roi_head.bbox_head.loss_cls, 'use_sigmoid', True), 'are no softmax'),
    (lambda d, c: setattr(d.roi_head.bbox_head, 'with_reg', False), 'classify and regress'),
    (lambda d, c: delattr(d, 'rpn_head'), "has the parts"),
])
def test_another_kind_is_refused(build_quantized, spoil, says):
    detector = copy.deepcopy(build_quantized(weight_bits=4, activation_bits=4))
    chains, _ = part_chains(detector)
    spoil(detector, chains)
    with pytest.raises(UsageError, match=says):
        whole_chain(detector, chains)
