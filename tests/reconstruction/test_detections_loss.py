"""The loss of a whole detector, against values worked out by hand."""
import math
from types import SimpleNamespace

import pytest
import torch

from pfcr_mm.reconstruction.build_loss import build_loss
from pfcr_mm.reconstruction.detections_loss import DetectionsLoss

KINDS = ('dense_scores', 'dense_deltas', 'present', 'scores', 'deltas', 'present', 'masks')


def log_odds(p):
    return math.log(p / (1 - p))


def loss_for(targets, kinds=KINDS):
    context = SimpleNamespace(
        view=SimpleNamespace(chain=SimpleNamespace(kinds=kinds)), device='cpu')
    return DetectionsLoss(targets, 1, context)


def predictions(objectness=(0.5, 0.25), deltas=0.0, classes=((0.5, 0.25, 0.25), ) * 3,
                boxes=0.0, mask=0.5, present=(1, 1, 1), masked=(1, )):
    """One image: two anchors at one place, three boxes of two classes, the last one with masks."""
    return (
        torch.tensor([log_odds(p) for p in objectness]).view(1, 2, 1, 1),
        torch.full((1, 8, 1, 1), float(deltas)),
        torch.tensor([present], dtype=torch.float32),
        torch.tensor([classes]).log(),
        torch.full((1, 3, 8), float(boxes)),
        torch.tensor([masked], dtype=torch.float32),
        torch.full((1, 1, 2, 2, 2), log_odds(mask)),
    )


def test_nothing_where_both_agree():
    target = predictions()
    assert loss_for([target])(target, target).item() == pytest.approx(0, abs=1e-6)


def kl(wanted, own):
    return sum(p * math.log(p / q) for p, q in zip(wanted, own))


@pytest.mark.parametrize('change, expected', [
    # divergence of both anchors, over 0.75 objects
    (dict(objectness=(0.75, 0.25)), kl((0.5, 0.5), (0.75, 0.25)) / 0.75),
    # a difference of 2 in all deltas of both anchors: as much for each object
    (dict(deltas=2.0), 2.0),
    # one box of three names other classes
    (dict(classes=((0.25, 0.5, 0.25), *((0.5, 0.25, 0.25), ) * 2)),
     kl((0.5, 0.25, 0.25), (0.25, 0.5, 0.25)) / 3),
    # all deltas by 3, for each object
    (dict(boxes=3.0), 3.0),
    # every pixel of the one mask, for each class by its share
    (dict(mask=0.75), kl((0.5, 0.5), (0.75, 0.25))),
])
def test_each_term_by_hand(change, expected):
    target = predictions()
    found = loss_for([target])(predictions(**change), target)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_levels_of_the_rpn_count_by_their_objects():
    """A wrong score on a level with a thousandth of an object is not divided by that."""
    kinds = ('dense_scores', 'dense_scores', 'dense_deltas', 'dense_deltas', *KINDS[2:])

    def two_levels(low, high):
        one, deltas, *rest = predictions(objectness=(0.5, 0.5))
        other = torch.full((1, 1, 1, 1), log_odds(high))
        return (one, other, deltas, torch.full((1, 4, 1, 1), low), *rest)

    target, own = two_levels(0.0, 0.001), two_levels(1.0, 0.01)
    expected = (kl((0.001, 0.999), (0.01, 0.99)) + 0.001) / 1.001
    assert loss_for([target], kinds)(own, target).item() == pytest.approx(expected, rel=1e-3)


def test_boxes_count_by_their_class():
    """A box that is background all but for a hundredth hardly counts, nor does its mask."""
    classes = ((0.5, 0.49, 0.01), (0.5, 0.49, 0.01), (0.005, 0.005, 0.99))
    target = predictions(classes=classes)
    moved = list(predictions(classes=classes))
    moved[4] = torch.zeros(1, 3, 8)
    moved[4][0, 2] = 1.0
    share = 2 * 0.99 + 0.01
    assert loss_for([target])(tuple(moved), target).item() == pytest.approx(0.01 / share, rel=1e-4)
    moved[4][0, 2, :4], moved[4][0, 1, :4] = 0.0, 1.0  # class 0 of box 1
    assert loss_for([target])(tuple(moved), target).item() == pytest.approx(
        (0.5 + 0.005) / share, rel=1e-4)


def test_absent_boxes_do_not_count():
    there = predictions(present=(1, 0, 1), masked=(1, ))
    other = list(predictions(present=(1, 0, 1)))
    other[3] = other[3].clone()
    other[3][0, 1] = torch.tensor([9.0, -9, 0])
    other[4] = torch.zeros(1, 3, 8)
    other[4][0, 1] = 7.0
    assert loss_for([there])(tuple(other), there).item() == pytest.approx(0, abs=1e-6)
    none = predictions(present=(0, 0, 0), masked=(0, ))
    loss = loss_for([none])(predictions(boxes=5.0, mask=0.9, present=(0, 0, 0)), none)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_no_masks_at_all():
    """`rois.detections=0`: the mask head sees nothing."""
    target = list(predictions())
    target[5], target[6] = torch.zeros(1, 0), torch.zeros(1, 0, 2, 2, 2)
    own = [x + 1 if i == 4 else x for i, x in enumerate(target)]
    assert loss_for([tuple(target)])(own, target).item() == pytest.approx(1.0, rel=1e-5)


def test_one_box_and_mask_for_all_classes():
    """Class-agnostic heads: what counts is that there is an object."""
    target = list(predictions())
    target[4], target[6] = torch.zeros(1, 3, 4), torch.zeros(1, 1, 1, 2, 2)
    own = list(target)
    own[4], own[6] = torch.ones(1, 3, 4), torch.full((1, 1, 1, 2, 2), log_odds(0.75))
    found = loss_for([tuple(target)])(tuple(own), tuple(target))
    assert found.item() == pytest.approx(1.0 + kl((0.5, 0.5), (0.75, 0.25)), rel=1e-5)


def test_a_batch_is_the_mean_of_its_images():
    targets = [predictions(), predictions(objectness=(0.9, 0.1), present=(1, 0, 0))]
    owns = [predictions(boxes=1.0, mask=0.7), predictions(deltas=0.5, objectness=(0.6, 0.2))]
    loss_of = loss_for(targets)
    both, wanted = (tuple(torch.cat(column) for column in zip(*x)) for x in (owns, targets))
    alone = [loss_of(own, target).item() for own, target in zip(owns, targets)]
    assert loss_of(both, wanted).item() == pytest.approx(sum(alone) / 2, rel=1e-6)
    # objects in the mean image of both: 0.75 and 1.0
    assert loss_of.amounts[0] == pytest.approx(0.875)


def test_gradients_are_those_of_finite_differences():
    target = predictions()
    loss_of = loss_for([tuple(t.double() for t in target)])
    own = [x.double() + 0.1 * torch.randn(x.shape, dtype=torch.float64) for x in target]
    moving = [0, 3, 6]  # L1 has corners

    def loss(*found):
        outputs = list(own)
        for place, x in zip(moving, found):
            outputs[place] = x
        return loss_of(outputs, [t.double() for t in target])

    assert torch.autograd.gradcheck(
        loss, [own[i].clone().requires_grad_() for i in moving], atol=1e-4)


def test_another_loss_elsewhere():
    targets = [(torch.randn(1, 3, 4), ), (torch.randn(1, 3, 4), )]
    context = SimpleNamespace(
        view=SimpleNamespace(chain=SimpleNamespace(kinds=()), prefix_tokens=0), device='cpu')
    ours = build_loss('detections', targets, 2, context)
    plain = build_loss('channel_mse', targets, 2, context)
    outputs = (torch.randn(1, 3, 4), )
    assert torch.equal(ours(outputs, targets[0]), plain(outputs, targets[0]))
