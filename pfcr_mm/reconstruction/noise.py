"""Random numbers that belong to an image: the same on any number of processes."""
import zlib

import torch

from .. import parallel
from ..errors import UsageError


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
    """Uniform random numbers for a batch, drawn image by image.

    An image's numbers depend on seed, step and image alone, and not on what else is in
    the batch, nor on how a batch is cut where memory runs out.

    Args:
        seed (int): of the unit.

    Example:
        >>> noise = ImageNoise(0)
        >>> noise.begin('mix', step=3, numbers=[5, 9], sizes=[1, 1])
        >>> noise(torch.zeros(2, 4)).shape
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

    def __call__(self, x):
        """Numbers in [0, 1) shaped like `x`, whose first axis is image-major."""
        factor, rest = divmod(x.shape[0] if x.dim() else 0, max(1, sum(self.sizes)))
        if rest or not factor:
            if parallel.world_size() > 1:
                raise UsageError(
                    f'quantize_cfg.reconstruction.keep_prob: a value of shape {tuple(x.shape)} '
                    'does not tell images apart, so several processes cannot drop alike; set '
                    'keep_prob=1')
            return torch.rand_like(x)
        if x.device not in self._generators:
            self._generators[x.device] = [
                torch.Generator(x.device).manual_seed(seed) for seed in self._seeds]
        return torch.cat([
            torch.rand(size * factor, *x.shape[1:], generator=generator, device=x.device,
                       dtype=x.dtype)
            for size, generator in zip(self.sizes, self._generators[x.device])])
