"""How a weight is rounded to its grid while, and after, it is learned."""
import torch
from torch import nn

from ..registry import ROUNDINGS, lookup
from . import functional as F


class Rounding(nn.Module):
    """Weight rounding of one layer.

    `forward(weight, quantizer)` gives the quantized weight. A unit's optimisation
    calls `open` on entry and `close` on exit; `harden` ends it all.
    """

    learns_weight = False  # does the layer's own weight get a gradient?
    of_one_scale = False  # does what was learned hold for one scale of the weight only?
    is_open = False  # between `open` and `close`

    def forward(self, weight, quantizer):
        return quantizer(weight)

    def open(self, weight, quantizer):
        """Start to learn; returns the rounding's own parameters."""
        return []

    def close(self):
        """Stop to learn."""

    def regularisation(self, progress):
        """Extra loss at `progress` in [0, 1] of the unit's optimisation."""
        return 0.0

    @torch.no_grad()
    def harden(self, weight, quantizer):
        """The final integer codes, as a float tensor shaped like the weight."""
        return quantizer.encode(weight)


@ROUNDINGS.register_module(name='nearest')
class NearestRounding(Rounding):
    """Round to nearest; nothing is learned."""


@ROUNDINGS.register_module(name='latent')
class LatentRounding(Rounding):
    """The float weight itself is learned, through a straight-through round."""

    learns_weight = True


@ROUNDINGS.register_module(name='adaround')
class AdaRound(Rounding):
    """Learn to round down or up (Nagel et al., arXiv 2004.10568).

    Soft while a unit is open, hard otherwise. On entry to a coarser unit the
    variables are pulled back to `reopen`, below the point ln 11 = 2.398 where
    the rectified sigmoid saturates; else weights decided once could never move.

    Args:
        weight_of_loss (float): factor of the regulariser, which is averaged over the layer's
            weights. Published code sums it times 0.01 beside a loss summed over channels: 10
            is that for a thousand weights a channel of the unit's output.
        warmup (float): share of the optimisation without regulariser.
        beta (tuple[float]): exponent at the end of the warm-up and at the end.
        reopen (float): bound on |v| when a unit is entered.
    """

    of_one_scale = True
    ZETA, GAMMA = 1.1, -0.1

    def __init__(self, weight_of_loss=10.0, warmup=0.2, beta=(20.0, 2.0), reopen=2.2):
        super().__init__()
        self.weight_of_loss = weight_of_loss
        self.warmup = warmup
        self.beta = beta
        self.reopen = reopen
        self.v = None

    def rectified(self):
        """h(v) in [0, 1]: how far up each weight is rounded."""
        return (torch.sigmoid(self.v) * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)

    def forward(self, weight, quantizer):
        if not quantizer.enabled or self.v is None:
            return quantizer(weight)
        up = self.rectified() if self.is_open else (self.v >= 0).to(weight.dtype)
        scale = quantizer.spread(quantizer.scale, weight)
        zero_point = quantizer.spread(quantizer.zero_point, weight)
        codes = torch.floor(weight.detach() / scale.detach()) + up + zero_point
        return F.uniform_decode(codes.clamp(*quantizer.code_range), scale, zero_point)

    @torch.no_grad()
    def open(self, weight, quantizer):
        if self.v is None:
            ratio = weight / quantizer.spread(quantizer.scale, weight)
            fraction = ratio - ratio.floor()
            self.v = nn.Parameter(
                -torch.log((self.ZETA - self.GAMMA) / (fraction - self.GAMMA) - 1))
        self.v.clamp_(-self.reopen, self.reopen)
        self.v.requires_grad_(True)
        self.is_open = True
        return [self.v]

    def close(self):
        self.v.requires_grad_(False)
        self.is_open = False

    def regularisation(self, progress):
        if progress < self.warmup:
            return 0.0
        start, end = self.beta
        beta = start + (end - start) * (progress - self.warmup) / (1 - self.warmup)
        return self.weight_of_loss * (1 - (2 * self.rectified() - 1).abs().pow(beta)).mean()

    @torch.no_grad()
    def harden(self, weight, quantizer):
        return quantizer.encode(self.forward(weight, quantizer))



def build_rounding(cfg):
    """Build a rounding from its name or from dict(type=name, ...)."""
    cfg = dict(type=cfg) if isinstance(cfg, str) else dict(cfg)
    return lookup(ROUNDINGS, cfg.pop('type'), 'rounding')(**cfg)
