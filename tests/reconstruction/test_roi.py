"""Streams into RoI heads: the float model's boxes, for quantized and float features alike."""
import copy

import pytest
import tiny_cascade
import torch
from mmdet.structures.bbox import bbox2roi
from tiny_models import calibrated, images_of

from pfcr_mm.models import part_chains
from pfcr_mm.models.roi_features import crops
from pfcr_mm.models.whole import padded
from pfcr_mm.reconstruction import roi
from pfcr_mm.reconstruction.part_streams import PartStreams

PROPOSALS, DETECTIONS = 12, 5
ROIS = dict(proposals=PROPOSALS, detections=DETECTIONS)


@pytest.fixture(scope='module')
def teacher():
    return tiny_cascade.build_quantized(tiny_cascade.build_float().state_dict())


@pytest.fixture(scope='module')
def model(teacher, images):
    return calibrated(copy.deepcopy(teacher), images)


def streams_of(model, teacher, images, parts=None, boxes=None):
    """Streams into all heads, run."""
    heads = parts or [p for p in part_chains(teacher)[0] if p not in ('backbone', 'neck')]
    streams = PartStreams((model, teacher), images_of(images), heads, boxes, ROIS, seed=0)
    streams.into(heads[0])
    return streams


@pytest.fixture(scope='module')
def boxes(teacher, images):
    return streams_of(teacher, teacher, images).boxes


def test_there_are_boxes_for_every_roi_part(teacher, boxes, images):
    parts = [name for name in part_chains(teacher)[0] if name.startswith('roi_head.')]
    assert list(boxes) == parts and len(parts) == 6
    assert all(len(found) == len(images) for found in boxes.values())


def test_every_stage_sees_the_same_proposals_refined(teacher, boxes, images):
    """Box k of stage n + 1 is box k of stage n after the float head n."""
    for index, (inputs, samples) in enumerate(images):
        maps = teacher.extract_feat(inputs)
        for stage in range(2):
            entering, leaving = (boxes[f'roi_head.bbox_head.{stage + i}'][index] for i in (0, 1))
            assert entering.shape == leaving.shape == (PROPOSALS, 4)
            head = teacher.roi_head.bbox_head[stage]
            scores, deltas = head(
                teacher.roi_head.bbox_roi_extractor[stage](maps[:4], bbox2roi([entering])))
            label = scores[:, :-1].argmax(1)
            deltas = deltas.view(len(deltas), -1, 4)[torch.arange(len(deltas)), label]
            expected = head.bbox_coder.decode(
                entering, deltas, max_shape=samples[0].metainfo['img_shape'])
            torch.testing.assert_close(leaving, expected, atol=1e-3, rtol=1e-4)


def test_refinement_is_mmdets(teacher, images):
    """All proposals through our loop end where mmdet's own refinement ends."""
    inputs, samples = images[0]
    maps = teacher.extract_feat(inputs)
    found = teacher.rpn_head.predict(maps, samples, rescale=False)[0].bboxes
    meta = samples[0].metainfo
    ours = roi.refined(teacher.roi_head, maps, found, meta)
    theirs, _, _ = teacher.roi_head._refine_roi(maps, bbox2roi([found]), [meta], (len(found), ))
    torch.testing.assert_close(ours[-1], theirs[0][:, 1:], atol=1e-3, rtol=1e-4)


def test_mask_stages_see_the_float_detections(boxes):
    first = boxes['roi_head.mask_head.0']
    assert all(len(b) <= DETECTIONS for b in first) and sum(map(len, first)) > 0
    for stage in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, boxes[f'roi_head.mask_head.{stage}']))


@pytest.mark.parametrize('part', [f'roi_head.{kind}_head.{stage}' for kind in ('bbox', 'mask')
                                  for stage in range(3)])
def test_quantized_and_float_streams_line_up(part, model, teacher, boxes, images):
    streams = streams_of(model, teacher, images, ['rpn_head', part], boxes)
    quantized, floating = streams.into(part)
    assert len(quantized) == len(floating) > 0
    size = 7 if 'bbox' in part else 14
    for ours, theirs in zip(quantized.states, floating.states):
        a, b = ours.tensors[0], theirs.tensors[0]
        assert a.shape == b.shape and a.shape[1:] == (16, size, size)
        assert not torch.equal(a, b)
        # the same box, seen through 4 bits: nearer to itself than to another box
        distance = torch.cdist(a.flatten(1), b.flatten(1))
        assert (distance.argmin(1) == torch.arange(len(a))).float().mean() > 0.5


def test_each_stage_uses_its_own_extractor(model, boxes, images, monkeypatch):
    used = []
    for stage, extractor in enumerate(model.roi_head.bbox_roi_extractor):
        monkeypatch.setattr(
            extractor, 'forward',
            lambda maps, rois, s=stage, f=extractor.forward: used.append(s) or f(maps, rois))
    part = 'roi_head.bbox_head.2'
    crops(model, part, model.extract_feat(images[0][0]), [boxes[part][0]])
    assert used == [2]


def test_float_detections_are_mmdets(teacher, boxes, images):
    """What `predict` finds, which pastes masks too."""
    for (inputs, samples), ours in zip(images, boxes['roi_head.mask_head.0']):
        maps = teacher.extract_feat(inputs)
        found = teacher.rpn_head.predict(maps, samples, rescale=False)
        results = teacher.roi_head.predict(maps, found, samples, rescale=False)
        assert torch.equal(ours, results[0].bboxes[:DETECTIONS])


def test_all_heads_share_one_run_of_each_model(model, teacher, images, monkeypatch):
    seen = {}
    for name, detector in (('quantized', model), ('float', teacher)):
        def counted(inputs, name=name, extract_feat=detector.extract_feat):
            seen.setdefault(name, []).append(len(inputs))
            return extract_feat(inputs)

        monkeypatch.setattr(detector, 'extract_feat', counted)
        monkeypatch.setattr(detector.roi_head, 'predict_mask', lambda *_, **__: pytest.fail())
    images = [images[0], *images]  # the others are of other sizes
    streams = streams_of(model, teacher, images)
    heads = [p for p in part_chains(teacher)[0] if p.startswith('roi_head.')]
    for part in heads:
        assert [len(stream) for stream in streams.into(part)] == [len(images)] * 2
    assert seen['float'] == [1] * len(images)  # boxes do not depend on who sits beside
    assert sorted(seen['quantized']) == [1] * (len(images) - 2) + [2]


def test_boxes_that_are_known_are_kept(model, teacher, images, boxes):
    """As in a run that is resumed, or in the second stage of POS."""
    moved = {part: [b + 1 for b in found] for part, found in boxes.items()}
    streams = streams_of(model, teacher, images, ['roi_head.bbox_head.0'], moved)
    assert streams.boxes is moved
    again = streams_of(model, teacher, images, ['rpn_head', 'roi_head.bbox_head.0'], moved)
    plain = streams_of(model, teacher, images, ['rpn_head', 'roi_head.bbox_head.0'], boxes)
    quantized, floating = again.into('roi_head.bbox_head.0')
    others = plain.into('roi_head.bbox_head.0')
    for ours, theirs in zip((quantized, floating), others):
        assert not torch.equal(ours.states[0].tensors[0], theirs.states[0].tensors[0])


def test_boxes_of_heads_that_come_later_are_found(model, teacher, boxes, images):
    """The first stage of POS has one of the heads, the second has all."""
    known = {'roi_head.bbox_head.0': boxes['roi_head.bbox_head.0']}
    streams = streams_of(model, teacher, images, boxes=known)
    assert list(streams.boxes) == list(boxes)
    for part, found in boxes.items():
        assert all(map(torch.equal, streams.boxes[part], found))


def test_an_image_without_proposals(teacher, images):
    maps = teacher.extract_feat(images[0][0])
    entering = roi.refined(
        teacher.roi_head, maps, torch.zeros(0, 4), images[0][1][0].metainfo)
    assert [tuple(b.shape) for b in entering] == [(0, 4)] * 3


def test_the_whole_detector_sees_images_with_their_boxes(model, teacher, boxes, images):
    """Known from the heads before, or found anew where these were not reconstructed."""
    for known in (boxes, None, {'roi_head.bbox_head.0': boxes['roi_head.bbox_head.0']}):
        streams = PartStreams(
            (model, teacher), images_of(images), ['detector'], known, ROIS, seed=0)
        quantized, floating = streams.into('detector')
        assert quantized.numbers == floating.numbers == list(range(len(images)))
        for index, (state, (inputs, _)) in enumerate(zip(quantized.states, images)):
            image, *found = state.tensors
            assert torch.equal(image, inputs) and len(found) == len(boxes) == 6
            last = 'roi_head.bbox_head.2'
            for (part, own), got in zip(boxes.items(), found):
                expected = [(own[index], PROPOSALS if 'bbox' in part else DETECTIONS)]
                if part == last:  # whose scores say how much a mask counts
                    expected.append((boxes['roi_head.mask_head.0'][index], DETECTIONS))
                assert torch.equal(got, torch.cat([padded(*pair) for pair in expected], 1))
            assert state.shapes == tuple(t.shape for t in state.tensors) and state.rows == 1
