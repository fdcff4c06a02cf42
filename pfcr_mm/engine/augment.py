"""Augmented views of calibration images: more to learn from, without more images."""
import torch
import torch.nn.functional as F

from .. import parallel
from ..models.chain import State
from ..reconstruction.cache import FeatureCache, Shelf
from ..reconstruction.capture import Images
from ..reconstruction.noise import seed_of
from .retarget import retarget

LEAST_AREA = 0.4  # of the image, in a crop
PASTED_AREA = 0.15, 0.5  # of the image, least and most, that CutMix replaces


def with_views(images, views, learned_on, seed, cache=None, cutmix=0.0, retargeted=0.0,
               logits=None):
    """Images to learn from several times, as cut and mirrored differently; the others once.

    With CutMix (arXiv 1905.04899) each process meanwhile holds the images of all.

    Args:
        images (Images): of calibration.
        views (int): of each image to learn from; the first is the image as it is.
        learned_on (int): so many images are learned from; those after them, which decide
            whether a unit is kept, stay last.
        seed (int): draws the cuts, with the image's number.
        cache (FeatureCache | None): keeps the views.
        cutmix (float): share of the further views into which a part of an image to learn from,
            drawn among all, is pasted.
        retargeted (float): share of the further views, the last of each image, that a classifier
            takes for another class, see `retarget`.
        logits (Callable | None): of the float classifier, on the device of the images.

    Returns:
        Images: numbered anew: the images, their second views, and so on, the others.
    """
    shelf = Shelf(cache or FeatureCache())
    entries = {}
    others = _of_all(images) if cutmix > 0 and views > 1 else images
    own_class = views - retargeted_views(views, retargeted)  # so many of each image have it
    for number, state, samples in zip(images.numbers, images.states, images.samples):
        if number >= learned_on:
            entries[number + (views - 1) * learned_on] = state, samples
            continue
        entries[number] = state, samples
        for view in range(1, views):
            place = number + view * learned_on
            generator = torch.Generator().manual_seed(seed_of(seed, 'view', place))
            inputs = cut_and_mirror(state.tensors[0], samples, generator)
            if torch.rand(1, generator=generator) < cutmix:
                other = others[torch.randint(learned_on, (1, ), generator=generator).item()]
                inputs = paste(inputs, samples, *other, generator)
            if view >= own_class:
                inputs = retarget(inputs, logits, generator)
            entries[place] = shelf.keep(State((inputs, ))), samples
    places = sorted(entries)
    states, samples = zip(*map(entries.get, places)) if places else ((), ())
    return Images(states, samples, places)


def retargeted_views(views, share):
    """How many of an image's views a classifier takes for another class, see `with_views`."""
    return round(share * (views - 1))


def cut_and_mirror(inputs, samples, generator):
    """A random part of an image at the image's size, mirrored half of the time.

    Args:
        inputs (Tensor): (1, 3, H, W), normalised.
        samples (list): one data sample; what its `img_shape` (h, w) leaves out is padding and
            stays.
        generator (torch.Generator): draws.

    Returns:
        Tensor: like `inputs`. The aspect ratio of things stays.
    """
    height, width = _shape(inputs, samples)
    share, down, right, mirror = torch.rand(4, generator=generator).tolist()
    side = (LEAST_AREA + (1 - LEAST_AREA) * share)**0.5
    cut_height, cut_width = max(1, round(height * side)), max(1, round(width * side))
    top, left = int(down * (height - cut_height + 1)), int(right * (width - cut_width + 1))
    part = inputs[..., top:top + cut_height, left:left + cut_width]
    part = F.interpolate(part, (height, width), mode='bilinear', align_corners=False)
    view = inputs.clone()
    view[..., :height, :width] = part.flip(-1) if mirror < 0.5 else part
    return view


def paste(inputs, samples, other, other_samples, generator):
    """An image with a random rectangle of another one, which is cut and mirrored before.

    Args:
        inputs (Tensor): (1, 3, H, W), normalised.
        samples (list): one data sample; padding stays.
        other (Tensor): (1, 3, H', W').
        other_samples (list): its data sample.
        generator (torch.Generator): draws.

    Returns:
        Tensor: like `inputs`. Where the other one is smaller, so is the rectangle.
    """
    sizes, other_sizes = _shape(inputs, samples), _shape(other, other_samples)
    least, most = PASTED_AREA
    side = (least + (most - least) * torch.rand(1, generator=generator).item())**0.5
    sides = [max(1, min(round(size * side), bound)) for size, bound in zip(sizes, other_sizes)]
    there, here = ([_somewhere(size - length, length, generator)
                    for size, length in zip(each, sides)] for each in (other_sizes, sizes))
    part = cut_and_mirror(other, other_samples, generator)[(..., *there)]
    mixed = inputs.clone()
    mixed[(..., *here)] = part
    return mixed


def _somewhere(room, length, generator):
    """`length` pixels of a row that has `room` more, as a slice."""
    start = torch.randint(room + 1, (1, ), generator=generator).item()
    return slice(start, start + length)


def _shape(inputs, samples):
    """(h, w) of the image, without padding."""
    return tuple(samples[0].metainfo.get('img_shape', inputs.shape[-2:])[:2])


def _of_all(images):
    """The images of all processes, by number."""
    if parallel.world_size() == 1:
        return images
    return parallel.whole(parallel.Shard(images, images.numbers))
