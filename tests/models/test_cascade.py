"""Cascade Mask R-CNN as our configs build it: parts, chains, census, float parity."""
import copy

import pytest
import tiny_cascade
import torch
from mmdet.structures.bbox import bbox2roi
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny_models import predict
from torch import nn

from pfcr_mm.models import State, part_chains
from pfcr_mm.modules import QuantConv2d, QuantConvTranspose2d, QuantLayer, QuantLinear

PARTS = ['backbone', 'neck', 'rpn_head', *(f'roi_head.bbox_head.{i}' for i in range(3)),
         *(f'roi_head.mask_head.{i}' for i in range(3))]


@pytest.fixture(scope='module')
def floating():
    return tiny_cascade.build_float()


@pytest.fixture(scope='module')
def detector(floating):
    return tiny_cascade.build_quantized(floating.state_dict())


def test_parts_are_named_as_modules(detector):
    chains, without = part_chains(detector)
    assert list(chains) == PARTS and without == {}
    assert [chain.name for chain in chains.values()] == PARTS
    for name, chain in chains.items():
        for leaf in chain.leaves[:1] if 'head' in name else ():
            detector.get_submodule(f'{name}.{leaf.name}')


def test_leaves_own_every_layer_once(detector):
    owned = [id(m) for chain in part_chains(detector)[0].values() for leaf in chain.leaves
             for root in leaf.modules for m in root.modules() if isinstance(m, QuantLayer)]
    assert sorted(owned) == sorted(id(m) for m in detector.modules() if isinstance(m, QuantLayer))


@pytest.mark.parametrize('stage', range(3))
def test_chains_compute_what_the_float_heads_do(stage, detector, floating, images):
    maps = detector.extract_feat(images[1][0])
    boxes = bbox2roi([torch.tensor([[0., 0, 30, 40], [10, 5, 60, 60], [3, 3, 9, 9]])])
    chains = part_chains(detector)[0]
    for kind in ('bbox', 'mask'):
        head = getattr(floating.roi_head, f'{kind}_head')[stage]
        extractor = getattr(floating.roi_head, f'{kind}_roi_extractor')[stage]
        rois = extractor(maps[:4], boxes)
        state, _ = chains[f'roi_head.{kind}_head.{stage}'].run(State((rois, )))
        expected = head(rois)
        expected = expected if kind == 'bbox' else (expected, )
        for ours, theirs in zip(state.tensors, expected):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_off_predicts_what_mmdets_cascade_does(detector, floating, images):
    for inputs, samples in images:
        ours, theirs = (predict(d, inputs, samples) for d in (detector, floating))
        assert len(ours) == len(theirs) > 0
        torch.testing.assert_close(ours.bboxes, theirs.bboxes, atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-4)


def same_predictions(detector, floating, inputs, samples):
    ours, theirs = (d.predict(inputs, copy.deepcopy(samples), rescale=False)
                    for d in (detector, floating))
    for a, b in zip(ours, theirs):
        assert len(a.pred_instances) == len(b.pred_instances)
        torch.testing.assert_close(
            a.pred_instances.scores, b.pred_instances.scores, atol=1e-4, rtol=1e-4)


def test_an_image_smaller_than_a_window(detector, floating, images):
    """32x32 pixels are 8x8 tokens at first, and 1x1 at last, in windows of 7x7."""
    sample = copy.deepcopy(images[0][1])
    sample[0].set_metainfo(dict(
        img_shape=(20, 24), pad_shape=(32, 32), batch_input_shape=(32, 32), ori_shape=(20, 24)))
    same_predictions(detector, floating, images[0][0][..., :32, :32], sample)


def test_a_batch_of_very_different_sizes(detector, floating, images):
    """One image fills the batch, one is a corner of it."""
    large, small = images[1][0], torch.zeros_like(images[1][0])
    small[..., :12, :9] = images[0][0][..., :12, :9]
    samples = [copy.deepcopy(images[1][1][0]) for _ in range(2)]
    samples[1].set_metainfo(dict(img_shape=(12, 9), ori_shape=(12, 9)))
    same_predictions(detector, floating, torch.cat([large, small]), samples)


def test_box_outputs_are_deltas_whatever_the_loss(detector):
    """GIoU on decoded boxes trains deltas: nothing special at inference."""
    head = detector.roi_head.bbox_head[0]
    assert head.reg_decoded_bbox and not head.reg_class_agnostic
    assert type(head.loss_bbox).__name__ == 'GIoULoss'
    assert head(torch.zeros(2, 16, 7, 7))[1].shape == (2, 4 * 6)


def test_a_roi_head_with_features_of_its_own_is_told(detector):
    other = copy.deepcopy(detector)
    kind = type('MyRoIHead', (type(other.roi_head), ), dict(_bbox_forward=lambda *_: None))
    other.roi_head.__class__ = kind
    chains, without = part_chains(other)
    assert set(without) == set(PARTS[3:])
    assert without['roi_head.mask_head.2'] == 'MyRoIHead has a _bbox_forward of its own'


@pytest.fixture(scope='module')
def full_size():
    return MODELS.build(Config.fromfile(tiny_cascade.CONFIG).model)


def test_census_of_the_full_cascade(full_size):
    records = {r.name: r for r in full_size.census}
    assert len(records) == len(full_size.census)
    layers = {n for n, m in full_size.named_modules()
              if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))}
    assert layers == {n for n, r in records.items() if r.kind != 'Matmul'}
    assert all(isinstance(full_size.get_submodule(n),
                          (QuantLinear, QuantConv2d, QuantConvTranspose2d)) for n in layers)
    assert all(r.skipped_reason is None for r in full_size.census)
    assert len([n for n in layers if 'bbox_head' in n]) == 3 * (4 + 1 + 2)
    assert len([n for n in layers if 'mask_head' in n]) == 3 * (4 + 2)
    eight = {n for n, r in records.items() if r.weight_bits == 8}
    assert eight == {
        'backbone.patch_embed.projection', 'rpn_head.rpn_cls', 'rpn_head.rpn_reg',
        *(f'roi_head.bbox_head.{i}.{end}' for i in range(3) for end in ('fc_cls', 'fc_reg')),
        *(f'roi_head.mask_head.{i}.conv_logits' for i in range(3))}


def test_stages_refine_with_their_own_coders(full_size):
    stds = [head.bbox_coder.stds for head in full_size.roi_head.bbox_head]
    assert [list(s) for s in stds] == [
        [0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
