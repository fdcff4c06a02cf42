"""Taps: what quantizers and layers see while a model runs."""
import math
from dataclasses import dataclass, field

import torch

from ..modules import QuantLayer, QuantMatmul, quantizers_of, real_rows
from .noise import Noise

VALUES = 4096  # values that a quantizer keeps of one call
KEPT = 32768  # and of all calls together
ROWS = 2048  # attention rows that one call looks at


@dataclass
class Seen:
    """What went through one quantizer."""

    samples: list = field(default_factory=list)  # (n, groups) of values before quantization
    kept: int = 0

    def values(self):
        """(n, groups) values, float32 on the CPU; None where nothing came by."""
        return torch.cat(self.samples) if self.samples else None


@dataclass
class Attention:
    """Attention weights of one attention, by head; sums over rows (queries)."""

    rows: int = 0
    entropy: torch.Tensor = 0.0  # (heads,) of what goes on, normalised to 0..1
    dead: torch.Tensor = 0.0  # (heads,) rows that are zero throughout


class Taps:
    """Watches every quantizer and, given the float twin, every layer, inside a `with` block.

    Handles are removed on exit, whatever happens; nothing of the model is changed.

    Args:
        model (nn.Module): a quantized model, quantizers on or off.
        twin (nn.Module | None): float, folded alike: its layers get the same inputs, and
            the local error is measured against them.

    Example:
        >>> with Taps(model) as taps:
        ...     model.predict(inputs, samples)
        >>> taps.seen['backbone.stages.0.blocks.0.ffn.layers.1.input_quantizer'].values()
    """

    def __init__(self, model, twin=None):
        self.model, self.twin = model, twin
        self.seen, self.attention, self.local = {}, {}, {}
        self._handles = []

    def __enter__(self):
        try:
            for name, quantizer in quantizers_of(self.model):
                if not name.endswith('weight_quantizer'):
                    self.seen[name] = Seen()
                    self._add(quantizer, self._look(self.seen[name]))
                if name.endswith('matmul_av.left_quantizer'):
                    attention = name.rpartition('.matmul_av')[0]
                    self.attention[attention] = Attention()
                    self._add(quantizer, _look_at_attention(self.attention[attention]))
            if self.twin is not None:
                twins = dict(self.twin.named_modules())
                for name, module in self.model.named_modules():
                    if isinstance(module, (QuantLayer, QuantMatmul)):
                        self.local[name] = Noise()
                        self._add(module, _compare(twins[name], self.local[name]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        while self._handles:
            self._handles.pop().remove()

    def _add(self, module, hook):
        self._handles.append(module.register_forward_hook(hook))

    @staticmethod
    def _look(seen):

        def hook(quantizer, args, output):
            x = args[0].detach()
            if x.numel() == 0 or seen.kept >= KEPT:
                return
            x = x.unsqueeze(-1) if quantizer.axis is None else x.movedim(quantizer.axis, -1)
            x = x.reshape(-1, x.shape[-1])
            # every k-th row, k odd: no random numbers, and no period in step with the shape
            step = max(1, len(x) * x.shape[1] // VALUES) | 1
            sample = x[::step].float().cpu()
            seen.samples.append(sample)
            seen.kept += sample.numel()

        return hook


def _look_at_attention(found):

    def hook(quantizer, args, output):
        weights = output.detach()
        if weights.numel() == 0:
            return
        weights = real_rows(quantizer, weights).movedim(1, 0).flatten(1, 2)  # (heads, rows, keys)
        weights = weights[:, ::max(1, weights.shape[1] // ROWS) | 1]
        found.rows += weights.shape[1]
        found.entropy = found.entropy + entropy(weights).sum(1).double().cpu()
        found.dead = found.dead + (weights.sum(-1) <= 0).sum(1).double().cpu()

    return hook


def entropy(weights):
    """Entropy of attention rows, as a share of the largest possible: 0 to 1.

    Rows are normalised to a sum of 1 first (a logarithmic quantizer does not keep it); a
    row of zeros has entropy 0.

    Args:
        weights (Tensor): (..., keys), not negative.

    Returns:
        Tensor: (...,).

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([1., 0.])
    """
    keys = weights.shape[-1]
    if keys < 2:
        return weights.new_zeros(weights.shape[:-1])
    share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(share).sum(-1) / math.log(keys)


def _compare(twin, noise):

    def hook(module, args, output):
        if output.numel():
            noise.add(twin(*args), output)

    return hook


@torch.no_grad()
def grid(quantizer):
    """The levels of a quantizer, ascending.

    Returns:
        Tensor | None: (groups, levels), float32 on the CPU; None for a kind that is not
        known or a quantizer without scales.
    """
    levels = quantizer.levels() if quantizer.calibrated else None
    return None if levels is None else levels.float()
