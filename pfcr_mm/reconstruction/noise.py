"""Random numbers that belong to an image: the same on any number of processes."""
import math
import zlib

import torch

from .. import parallel
from ..errors import UsageError
from ..quantizers import random_mask


def seed_of(*facts):
    """A seed of 32 bits out of numbers and names."""
    return zlib.crc32(repr(facts).encode())


class PerImage:
    """Generators for what is drawn of an image: by seed, name and image, whatever came before.

    Args:
        seed (int): of the run.
    """

    def __init__(self, seed):
        self.seed = seed
        self.begin_image(0)

    def begin_image(self, number):
        """What follows is of the image with this number."""
        self._image, self._generators = number, {}

    def generator(self, name):
        """The generator of a name, which goes on from call to call."""
        if name not in self._generators:
            self._generators[name] = torch.Generator().manual_seed(
                seed_of(self.seed, name, self._image))
        return self._generators[name]


class ImageNoise:
    """Random masks for a batch, drawn image by image.

    An image's masks depend on seed, step and image alone, and not on what else is in the
    batch, nor on how a batch is cut where memory runs out.

    Args:
        seed (int): of the unit.

    Example:
        >>> noise = ImageNoise(0)
        >>> noise.begin('mix', step=3, numbers=[5, 9], sizes=[1, 1])
        >>> noise(torch.zeros(2, 4), 0.5).shape
        torch.Size([2, 4])
    """

    def __init__(self, seed):
        self.seed = seed

    def begin(self, use, step, numbers, sizes):
        """Start the numbers of a step.

        Args:
            use (str): what they are for; uses are independent.
            step (int): of the optimisation.
            numbers (list[int]): of the batch's images.
            sizes (list[int]): rows of each.
        """
        self.sizes, self._generators = sizes, {}
        self._seeds = [seed_of(self.seed, use, step, number) for number in numbers]

    def __call__(self, x, share):
        """1 with probability `share` (in steps of 1/256), else 0; uint8.

        Shaped like `x`, whose first axis is image-major. Only a share of 0 gives no ones, and
        of 1 no zeros.
        """
        if share in (0, 1):
            return torch.full_like(x, share, dtype=torch.uint8)
        factor, rest = divmod(x.shape[0] if x.dim() else 0, max(1, sum(self.sizes)))
        if rest or not factor:
            if parallel.world_size() > 1:
                raise UsageError(
                    f'quantize_cfg.reconstruction.keep_prob: a value of shape {tuple(x.shape)} '
                    'does not tell images apart, so several processes cannot drop alike; set '
                    'keep_prob=1')
            return random_mask(x, share)
        if x.device not in self._generators:
            self._generators[x.device] = [
                torch.Generator(x.device).manual_seed(seed) for seed in self._seeds]
        mask, start = torch.empty(x.shape, dtype=torch.bool, device=x.device), 0
        bound = min(255, max(1, round(256 * share)))
        for size, generator in zip(self.sizes, self._generators[x.device]):
            part = mask[start:start + size * factor]
            torch.lt(_bytes(part.shape, generator), bound, out=part)
            start += size * factor
        return mask.view(torch.uint8)


def _bytes(shape, generator):
    """Random bytes: of 64-bit numbers, which takes a fifth of the time of as many floats."""
    count = math.prod(shape)
    numbers = torch.empty(-(-count // 8), dtype=torch.int64, device=generator.device)
    numbers.random_(-2**63, None, generator=generator)
    return numbers.view(torch.uint8)[:count].view(shape)
