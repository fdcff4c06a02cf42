"""Reconstruction losses: how far a unit's output is from its float target."""
import torch

from .. import parallel
from ..registry import RECONSTRUCTION_LOSSES


@RECONSTRUCTION_LOSSES.register_module(name='mse')
class MSELoss:
    """Mean squared error over all elements, divided by the target's mean square.

    Built once a unit from its targets, those of all processes; called with a batch. Class
    tokens, which a classifier's result is read from, would be one in hundreds: they have a
    share of the loss of their own, whatever the number of patches.

    Args:
        targets (Sequence[tuple[Tensor]]): the unit's targets, one tuple an entry.
        channel_axis (int): axis of the channels.
        prefix_tokens (int): class tokens, first along axis 1 of (B, N, C).
        device (torch.device): where to look at the targets.
    """

    prefix_share = 0.25

    # A batch's loss is the mean over its rows of something that no other row changes, and
    # what was taken from targets is the same everywhere: processes may share a batch.
    shares_batches = True

    @classmethod
    def from_context(cls, targets, channel_axis, context, options):
        """The loss of a unit; the context's view knows of class tokens."""
        own = (context.view.prefix_tokens, context.device) if context else ()
        return cls(targets, channel_axis, *own, **options)

    def __init__(self, targets, channel_axis, prefix_tokens=0, device='cpu'):
        self.channel_axis, self.prefix_tokens = channel_axis, prefix_tokens
        outputs = max(parallel.gather(len(targets[0]) if targets else 0))
        # one look at each: targets in files are read as they are asked for
        self.weights = [self._weight(t[k].to(device) for t in targets) for k in range(outputs)]

    def _weight(self, tensors):
        count = energy = 0
        for t in tensors:
            count += t.numel()
            energy = energy + t.float().square().sum().double()
        count, energy = _totals(count, energy)
        return (1.0 / (energy / max(1, count)).clamp(min=1e-12)).float()

    def __call__(self, outputs, targets):
        """Mean over the output tensors, each with equal weight."""
        losses = []
        for k, (output, target) in enumerate(zip(outputs, targets)):
            self.weights[k] = self.weights[k].to(output.device)  # once
            if output.numel():
                losses.append(self._mean(
                    self._error(output, target) * self._spread(self.weights[k], output)))
        return torch.stack(losses).mean()

    def _error(self, output, target):
        return (output - target).square()

    def _mean(self, error):
        count, share = self.prefix_tokens, self.prefix_share
        if not count or error.dim() != 3 or error.shape[1] <= count:
            return error.mean()
        return share * error[:, :count].mean() + (1 - share) * error[:, count:].mean()

    def _spread(self, weight, x):
        return weight


@RECONSTRUCTION_LOSSES.register_module(name='channel_mse')
class ChannelMSELoss(MSELoss):
    """Mean squared error, each channel divided by its target's variance.

    A transformer's residual stream carries a few channels of huge magnitude: plain
    MSE is their error and little else. A channel's variance counts as no less than
    `floor` of the mean variance, so that dead channels do not take over instead.
    """

    floor = 0.01

    def _weight(self, tensors):
        count = total = square = 0
        for t in tensors:
            rows = t.float().movedim(self.channel_axis, 0).flatten(1).double()
            count += rows.shape[1]
            total = total + rows.sum(1)
            square = square + rows.square().sum(1)
        count, total, square = _totals(count, total, square)
        variance = (square - total**2 / max(1, count)) / max(1, count)
        variance = variance.clamp(min=0)
        variance = torch.maximum(variance, self.floor * variance.mean()).clamp(min=1e-12)
        return (1.0 / variance).float()

    def _spread(self, weight, x):
        shape = [1] * x.dim()
        shape[self.channel_axis] = -1
        return weight.view(shape)


@RECONSTRUCTION_LOSSES.register_module(name='norm_mse')
class NormMSELoss(ChannelMSELoss):
    """Squared error as the LayerNorm behind a unit sees it: `channel_mse` of tokens on one scale.

    Output and target of each token are divided by the deviation of its target's channels, then
    each channel by the variance of all targets so divided. A few tokens with massive
    activations (arXiv 2402.17762) have nearly all of a channel's variance; without this the
    channel would count for nothing in all the others. A deviation counts as no less than
    `least` of the image's mean deviation, so that flat areas do not take over. Outputs that
    have no positions, such as logits, are compared as by `channel_mse`.
    """

    least = 0.1

    def _weight(self, tensors):
        return super()._weight(t / self._deviation(t) for t in map(torch.Tensor.float, tensors))

    def _error(self, output, target):
        return super()._error(output, target) / self._deviation(target).square()

    def _deviation(self, target):
        """Of the channels at each position of (B, ...), the channel axis having one entry."""
        if target.dim() < 3:
            return target.new_ones(())
        deviation = target.std(self.channel_axis, correction=0, keepdim=True)
        mean = deviation.mean([*range(1, target.dim())], keepdim=True)
        return torch.maximum(deviation, self.least * mean).clamp(min=1e-6)


def _totals(*sums):
    """Over all processes, on the CPU."""
    return (parallel.total(own.cpu() if torch.is_tensor(own) else own) for own in sums)
