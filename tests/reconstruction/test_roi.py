"""Streams into RoI heads: the float model's boxes, for quantized and float features alike."""
import copy

import pytest
import tiny_cascade
import torch
from mmdet.structures.bbox import bbox2roi
from tiny_models import calibrated

from pfcr_mm.models import part_chains
from pfcr_mm.reconstruction import roi
from pfcr_mm.reconstruction.capture import Images
from pfcr_mm.reconstruction.part_streams import PartStreams, feature_stream

PROPOSALS, DETECTIONS = 12, 5


@pytest.fixture(scope='module')
def teacher():
    return tiny_cascade.build_quantized(tiny_cascade.build_float().state_dict())


@pytest.fixture(scope='module')
def model(teacher, images):
    return calibrated(copy.deepcopy(teacher), images)


@pytest.fixture(scope='module')
def boxes(teacher, images):
    images = Images.of(images)
    return roi.float_boxes(
        teacher, feature_stream(teacher, images), images.samples, PROPOSALS, DETECTIONS, seed=0)


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
    streams = PartStreams((model, teacher), Images.of(images))
    quantized, floating = streams.into(part, lambda features: boxes)
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
    roi.roi_stream(model, part, feature_stream(model, Images.of(images[:1])), boxes[part])
    assert used == [2]


def test_an_image_without_proposals(teacher, images):
    maps = teacher.extract_feat(images[0][0])
    entering = roi.refined(
        teacher.roi_head, maps, torch.zeros(0, 4), images[0][1][0].metainfo)
    assert [tuple(b.shape) for b in entering] == [(0, 4)] * 3
