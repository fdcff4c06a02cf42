"""Scales of matrix products' operands, by the error of the product.

An element's own error says little of attention: all weights of a row are added up, and the
many small ones, each lost without much of an error, may be most of the row.
"""
from dataclasses import dataclass, field

import torch

from .. import parallel

_ROWS = 32  # of an image, that a product is sampled by
_WINDOWS = 4  # of an image, that they come from
_BUDGET = 2**21  # numbers kept of a product


@dataclass
class ProductSample:
    """A few rows of a product, of as many images as find room.

    Every image draws a key; those with the smallest stay, which are the same whatever the
    order of images and the number of processes.
    """

    budget: int = _BUDGET
    entries: list = field(default_factory=list)  # (key, left, right)

    def add(self, left, right, generator):
        """Offer the operands of a call.

        Args:
            left (Tensor): (B, heads, rows, K).
            right (Tensor): (B, heads, K, C).
            generator (torch.Generator): draws the key.
        """
        key = torch.rand((), generator=generator, dtype=torch.float64).item()
        self.entries.append((key, left.float().cpu(), right.float().cpu()))
        self._prune()

    def settle(self):
        """End of the stream: the sample of all processes."""
        self.entries = [entry for part in parallel.gather(self.entries) for entry in part]
        self._prune()

    @property
    def pairs(self):
        """list[tuple[Tensor, Tensor]]: left and right operands."""
        return [(left, right) for _, left, right in self.entries]

    def _prune(self):
        self.entries.sort(key=lambda entry: entry[0])
        total, kept = 0, 0
        for _, left, right in self.entries:
            total += left.numel() + right.numel()
            if kept and total > self.budget:
                break
            kept += 1
        del self.entries[kept:]


def some_rows(left, right, valid, generator):
    """A few rows of `left` out of a few windows, and what they are multiplied by.

    Args:
        left (Tensor): (B, heads, N, K).
        right (Tensor): (B, heads, K, C).
        valid (Tensor | None): (windows, N), bool: rows that are no padding, of an image's windows.
        generator (torch.Generator): draws, on the CPU.

    Returns:
        tuple[Tensor, Tensor] | None: (b, heads, rows, K) and (b, heads, K, C); None where
        there is nothing but padding.
    """
    weights = torch.ones(left.shape[0], left.shape[-2])
    if valid is not None:
        weights = valid.float().cpu().repeat(left.shape[0] // len(valid), 1)
    windows = weights.any(1).nonzero().flatten()
    if not len(windows):
        return None
    windows = windows[torch.randperm(len(windows), generator=generator)[:_WINDOWS]]
    rows = torch.multinomial(
        weights[windows], _ROWS // len(windows), replacement=True, generator=generator)
    windows, rows = windows.to(left.device), rows.to(left.device)
    left = left.transpose(1, 2)[windows[:, None], rows].transpose(1, 2)
    return left, right[windows]


@torch.no_grad()
def refine_products(model, samples, rounds):
    """Search scales again for the least error of products, in turn for left and right operands.

    The error is to the float product, with the other operand quantized as it is in force.

    Args:
        model (nn.Module): quantized, all operands calibrated that data reached.
        samples (dict[str, ProductSample]): by name of each `QuantMatmul`.
        rounds (int): turns.
    """
    for name, sample in samples.items():
        matmul = model.get_submodule(name)
        operands = matmul.left_quantizer, matmul.right_quantizer
        if not sample.entries:  # no data reached it
            continue
        device = operands[0].log_scale.device
        pairs = [(left.to(device), right.to(device)) for left, right in sample.pairs]
        targets = [left @ right for left, right in pairs]
        for turn in range(rounds):
            for side in (0, 1):
                _refine(operands, side, pairs, targets, again=turn > 0)


def _refine(operands, side, pairs, targets, again):
    quantizer, other = operands[side], operands[1 - side]
    others = [other.fake_quantize(pair[1 - side]) for pair in pairs]

    def error():
        """Of the products, with the grid in force; for each scale."""
        total = 0.0
        for pair, known, target in zip(pairs, others, targets):
            own = quantizer.fake_quantize(pair[side])
            product = own @ known if side == 0 else known @ own
            total = total + quantizer.by_scale(product.sub_(target).square_()).sum(1)
        return total

    values = [quantizer.by_scale(pair[side]) for pair in pairs]
    low = torch.stack([value.amin(1) for value in values]).amin(0)
    high = torch.stack([value.amax(1) for value in values]).amax(0)
    quantizer.refine_by(error, low, high, again)
