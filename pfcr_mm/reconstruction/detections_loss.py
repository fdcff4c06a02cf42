"""What a whole detector learns from: the float model's predictions."""
import torch
import torch.nn.functional as F

from .. import parallel
from ..models.whole import DELTAS, DENSE_DELTAS, DENSE_SCORES, MASKS, PRESENT, SCORES
from ..registry import RECONSTRUCTION_LOSSES
from .build_loss import build_loss
from .guided_losses import OrOther


@RECONSTRUCTION_LOSSES.register_module(name='detections')
class DetectionsLoss(OrOther):
    """Distance of a whole detector's predictions from the float ones, another loss elsewhere.

    Terms, added up: divergence (KL) of the RPN's objectness, of the box heads' classes and of the
    masks' pixels; difference (L1) of box deltas, of the RPN and of the box heads. Objectness
    counts at all anchors, classes in all boxes; deltas by the float probability of the object or
    class they belong to, masks by that of their class. Each term is a sum over an image, divided
    by the mean over images of what it counts by: scores of the RPN's anchors, boxes,
    probabilities of classes in these.

    Args:
        other (str | dict): loss of all other units.
    """

    def __init__(self, targets, channel_axis, context, other='channel_mse'):
        self.kinds = context.view.chain.kinds
        self.other = None if self.kinds else build_loss(other, targets, channel_axis, context)
        if self.kinds:
            self.amounts = self._amounts(targets, context.device)

    def __call__(self, outputs, targets):
        if self.other is not None:
            return self.other(outputs, targets)
        total = 0.0
        for (distance, _), amount in zip(self._terms(outputs, targets), self.amounts):
            total = total + distance / amount
        return total / len(targets[0])

    def _amounts(self, targets, device):
        """By term: how much of what it is about is in an image, over all processes."""
        entries = (tuple(t.to(device).float() for t in targets[i]) for i in range(len(targets)))
        own = [[amount for _, amount in self._terms(entry, entry)] for entry in entries]
        images = parallel.total(len(own))
        sums = [torch.stack(column).double().sum().item() for column in zip(*own)]
        found = [column for column in parallel.gather(sums) if column]
        return [max(sum(column) / images, 1e-6) for column in zip(*found)]

    def _terms(self, outputs, targets):
        """Yield (distance, amount) of each term, sums over all images of a batch."""
        found = list(zip(self.kinds, outputs, targets))
        scores, deltas = ([(own, wanted) for k, own, wanted in found if k == kind]
                          for kind in (DENSE_SCORES, DENSE_DELTAS))
        objects = [wanted.sigmoid() for _, wanted in scores]
        # all levels in one: a level that hardly has an object counts for little
        yield _added((_bernoulli_kl(own, wanted).sum(), share.sum())
                     for (own, wanted), share in zip(scores, objects))
        yield _added(_deltas(own, wanted, 1, share)
                     for (own, wanted), share in zip(deltas, objects))
        scores = present = None
        for kind, own, wanted in found:
            if kind == PRESENT:
                present = wanted
            elif kind == SCORES:
                scores = wanted.softmax(-1)[..., :-1]
                kl = F.kl_div(own.log_softmax(-1), wanted.log_softmax(-1), reduction='none',
                              log_target=True).sum(-1)
                yield (kl * present).sum(), present.sum()
            elif kind == DELTAS:
                yield _deltas(own, wanted, 2, _by_class(scores, wanted, 4) * present[..., None])
            elif kind == MASKS:
                # their boxes come last among those of the box head before them
                own_scores = scores[:, scores.shape[1] - wanted.shape[1]:]
                share = _by_class(own_scores, wanted, 1) * present[..., None]
                yield (_bernoulli_kl(own, wanted).mean((3, 4)) * share).sum(), share.sum()


def _bernoulli_kl(logits, wanted):
    """Divergence of sigmoid(logits) from sigmoid(wanted), element by element."""
    p = wanted.sigmoid()
    return (F.binary_cross_entropy_with_logits(logits, p, reduction='none')
            - F.binary_cross_entropy_with_logits(wanted, p, reduction='none'))


def _added(terms):
    """The sums of pairs, first and second."""
    return tuple(sum(column) for column in zip(*terms))


def _deltas(own, wanted, axis, share):
    """L1 of deltas, four by four along `axis`, times `share`; and the sum of the shares."""
    distance = (own - wanted).abs().unflatten(axis, (-1, 4)).mean(axis + 1)
    return (distance * share).sum(), share.sum()


def _by_class(scores, x, size):
    """Probabilities (B, n, C) where x has `size` channels a class, their sum where it has one."""
    return scores if x.shape[2] == size * scores.shape[2] else scores.sum(2, keepdim=True)
