"""Scales of matrix products' operands, by the error of the product.

An element's own error says little of attention: all weights of a row are added up, and the
many small ones, each lost without much of an error, may be most of the row.
"""
import math
from dataclasses import dataclass, field

import torch

from .. import parallel

_WINDOWS = 4  # of an image
_ROWS, _COLUMNS = 64, 16  # of a product, of one image at most: rows differ most
_FEWEST = 8  # of each, where they are long
_OF_AN_IMAGE = 2**17  # numbers of an operand at most, where that is not fewer than these
_BUDGET = 2**22  # numbers kept of a product's operands


@dataclass
class ProductSample:
    """Rows and columns of a product, of as many images as find room.

    Every image draws a key; those with the smallest stay, as long as there is room for all of
    them. They are the same whatever the order of images and the number of processes.
    """

    budget: int = _BUDGET
    entries: list = field(default_factory=list)  # (key, left, right), by key
    bound: float = math.inf  # the smallest key that found no room: none from it on does

    def add(self, key, left, right):
        """Offer an image's operands (b, heads, rows, K) and (b, heads, K, columns)."""
        self.entries.append((key, left.float().cpu(), right.float().cpu()))
        self._prune()

    def settle(self):
        """End of the stream: the sample of all processes."""
        parts = parallel.gather((self.entries, self.bound))
        self.entries = [entry for entries, _ in parts for entry in entries]
        self.bound = min(bound for _, bound in parts)
        self._prune()

    @property
    def pairs(self):
        """list[tuple[Tensor, Tensor]]: left and right operands, those of one shape together."""
        alike = {}
        for _, left, right in self.entries:
            alike.setdefault((left.shape[1:], right.shape[1:]), []).append((left, right))
        return [tuple(map(torch.cat, zip(*pairs))) for pairs in alike.values()]

    def _prune(self):
        self.entries.sort(key=lambda entry: entry[0])
        total = 0
        for place, (key, left, right) in enumerate(self.entries):
            total += left.numel() + right.numel()
            if key >= self.bound or place and total > self.budget:
                self.bound = min(self.bound, key)
                del self.entries[place:]
                return


def part_of(left, right, valid, generator):
    """A few rows of `left`, out of a few windows, and a few columns of what they multiply.

    Args:
        left (Tensor): (B, heads, N, K).
        right (Tensor): (B, heads, K, C).
        valid (Tensor | None): (windows, N), bool: rows that are no padding, of an image's
            windows. Attention weights have it; padded queries do count where they meet keys.
        generator (torch.Generator): draws, on the CPU.

    Returns:
        tuple[Tensor, Tensor] | None: (b, heads, rows, K) and (b, heads, K, columns); None where
        there is nothing but padding.
    """
    weights = torch.ones(left.shape[0], left.shape[-2])
    if valid is not None:
        weights = valid.float().cpu().repeat(left.shape[0] // len(valid), 1)
    windows = weights.any(1).nonzero().flatten()
    if not len(windows):
        return None
    windows = windows[torch.randperm(len(windows), generator=generator)[:_WINDOWS]]
    lines = _OF_AN_IMAGE // (left.shape[1] * left.shape[-1])
    rows = torch.multinomial(
        weights[windows], min(_ROWS, max(_FEWEST, lines)) // len(windows), replacement=True,
        generator=generator)
    columns = torch.randperm(right.shape[-1], generator=generator)[
        :min(_COLUMNS, max(_FEWEST, lines // len(windows)))]
    windows, rows, columns = (picked.to(left.device) for picked in (windows, rows, columns))
    left = left.transpose(1, 2)[windows[:, None], rows].transpose(1, 2)
    return left, right[windows][..., columns]


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
        quantizers = matmul.left_quantizer, matmul.right_quantizer
        if not sample.entries or not all(quantizer.calibrated for quantizer in quantizers):
            continue  # no data reached it
        device = quantizers[0].log_scale.device
        pairs = [(left.to(device), right.to(device)) for left, right in sample.pairs]
        targets = [left @ right for left, right in pairs]
        for turn in range(rounds):
            for side in (0, 1):
                _refine(matmul, side, pairs, targets, again=turn > 0)


def _refine(matmul, side, pairs, targets, again):
    quantizer = (matmul.left_quantizer, matmul.right_quantizer)[side]

    def quantized(side, pair):
        if side == 0:
            return matmul.quantize_left(pair[0], matmul.left_quantizer.fake_quantize)
        return matmul.right_quantizer.fake_quantize(pair[1])

    others = [quantized(1 - side, pair) for pair in pairs]

    def error():
        """Of the products, with the grid in force; for each scale."""
        total = 0.0
        for pair, known, target in zip(pairs, others, targets):
            own = quantized(side, pair)
            product = own @ known if side == 0 else known @ own
            total = total + quantizer.by_scale(product.sub_(target).square_()).sum(1)
        return total

    values = [quantizer.by_scale(pair[1] if side else matmul.from_centre(pair[0]))
              for pair in pairs]
    low = torch.stack([value.amin(1) for value in values]).amin(0)
    high = torch.stack([value.amax(1) for value in values]).amax(0)
    quantizer.refine_by(error, low, high, again)
