"""Views of calibration images: which there are, what they show, that seeds decide."""
import pytest
import torch
from mmengine.structures import BaseDataElement
from tiny_models import images_of

from pfcr_mm.engine import augment
from pfcr_mm.engine.augment import LEAST_AREA, PASTED_AREA, cut_and_mirror, paste, with_views


def image(value=None, height=24, width=30, **metainfo):
    """An image whose first channel is its columns and second its rows, or of one value."""
    inputs = torch.full((1, 3, height, width), float(value or 0))
    if value is None:
        inputs[0, 0] = torch.arange(width).float()
        inputs[0, 1] = torch.arange(height).float()[:, None]
    return inputs, [BaseDataElement(metainfo=metainfo)]


def shard(count, numbers=None):
    numbers = list(range(count)) if numbers is None else numbers
    return images_of([image(n + 1) for n in numbers], numbers)


def values(images):
    return [int(inputs[0, 0, 0, 0]) - 1 for inputs, _ in images]


def test_order_and_numbers():
    """Five images, the last two decide about units: they come once, and last."""
    found = with_views(shard(5), 3, 3, seed=0)
    assert values(found) == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]
    assert found.numbers == list(range(11))


def test_one_view_is_the_images_themselves():
    images = shard(4)
    found = with_views(images, 1, 3, seed=0)
    assert found.numbers == images.numbers
    assert list(found.states) == images.states


def test_several_processes_hold_what_one_holds():
    whole = with_views(shard(5), 2, 4, seed=3)
    parts = [with_views(shard(5, numbers), 2, 4, seed=3) for numbers in ([0, 2, 4], [1, 3])]
    joined = {n: inputs for part in parts for n, (inputs, _) in zip(part.numbers, part)}
    assert sorted(joined) == whole.numbers
    assert all(torch.equal(joined[n], inputs) for n, (inputs, _) in zip(whole.numbers, whole))


def test_views_differ_and_a_seed_repeats_them():
    images = images_of([image()], [0])
    first, again, other = (with_views(images, 4, 1, seed) for seed in (0, 0, 1))
    assert torch.equal(first[0][0], images[0][0])  # the first view is the image as it is
    for i in range(1, 4):
        assert torch.equal(first[i][0], again[i][0])
        assert not torch.equal(first[i][0], other[i][0])
        assert not torch.equal(first[i][0], first[i - 1][0])


def test_a_view_is_a_part_of_the_image_in_its_shape():
    inputs, samples = image()
    mirrored = 0
    for seed in range(60):
        view = cut_and_mirror(inputs, samples, torch.Generator().manual_seed(seed))
        assert view.shape == inputs.shape and view.min() >= 0 and view.max() < 29.001
        columns, rows = view[0, 0, 12], view[0, 1, :, 15]
        steps = columns.diff()[2:-2]  # at the border the last column is repeated
        mirrored += steps.mean().item() < 0
        # things grow by as much in width as in height, by 1 / sqrt(area) at most
        growth = steps.abs().mean().item(), rows.diff()[2:-2].mean().item()
        assert growth[0] == pytest.approx(growth[1], abs=0.05)
        assert LEAST_AREA**0.5 - 0.05 < growth[0] <= 1.001
        assert (rows.diff() >= 0).all()  # never upside down
    assert 15 < mirrored < 45


def test_padding_stays():
    inputs, samples = image(img_shape=(16, 20))
    inputs[..., 16:, :] = inputs[..., 20:] = -7
    for seed in range(10):
        view = cut_and_mirror(inputs, samples, torch.Generator().manual_seed(seed))
        assert (view[..., 16:, :] == -7).all() and (view[..., 20:] == -7).all()
        assert view[..., :16, :20].min() >= 0


def test_a_part_of_another_image_is_pasted():
    """Of the other image's own cut and mirrored pixels, in one rectangle."""
    areas = []
    for seed in range(60):
        mixed = paste(*image(1), *image(), torch.Generator().manual_seed(seed))
        foreign = (mixed[0] != 1).any(0)
        rows, columns = foreign.any(1).nonzero(), foreign.any(0).nonzero()
        height, width = (found.max() - found.min() + 1 for found in (rows, columns))
        assert foreign.sum() == height * width == (mixed[0, 2] == 0).sum()
        areas.append(foreign.sum().item() / foreign.numel())
    assert PASTED_AREA[0] - 0.05 < min(areas) < 0.2 and 0.45 < max(areas) < PASTED_AREA[1] + 0.05


def test_pasting_leaves_padding_alone_and_takes_none():
    inputs, samples = image(1, img_shape=(16, 20))
    inputs[..., 16:, :] = inputs[..., 20:] = -7
    other, other_samples = image(2, 10, 40, img_shape=(9, 31))
    other[..., 9:, :] = other[..., 31:] = -8
    for seed in range(20):
        mixed = paste(inputs, samples, other, other_samples, torch.Generator().manual_seed(seed))
        assert (mixed[..., 16:, :] == -7).all() and (mixed[..., 20:] == -7).all()
        assert set(mixed[..., :16, :20].round(decimals=4).unique().tolist()) == {1, 2}
        assert (mixed > 1.5).any(3).sum(2).max() <= 9
    assert set(inputs.unique().tolist()) == {-7, 1}


def test_cutmix_takes_images_that_are_learned_from_into_a_share_of_the_views():
    """Of 9 images the last 3 decide about units; nothing of them is seen elsewhere."""
    kept = with_views(shard(9), 9, 6, seed=0)
    found = with_views(shard(9), 9, 6, seed=0, cutmix=0.5)
    assert found.numbers == kept.numbers
    assert all(torch.equal(found[i][0], kept[i][0]) for i in (*range(6), *range(54, 57)))
    changed = [not torch.equal(found[i][0], kept[i][0]) for i in range(6, 54)]
    assert 12 < sum(changed) < 36
    seen = torch.cat([inputs for inputs, _ in found][6:54]).unique() - 1
    assert set(seen.round().tolist()) == set(range(6))


def test_several_processes_paste_alike(monkeypatch):
    whole = with_views(shard(5), 3, 4, seed=3, cutmix=1.0)
    monkeypatch.setattr(augment.parallel, 'world_size', lambda: 2)
    monkeypatch.setattr(augment.parallel, 'whole', lambda own: list(shard(5)))
    for numbers in ([0, 2, 4], [1, 3]):
        part = with_views(shard(5, numbers), 3, 4, seed=3, cutmix=1.0)
        place = {n: i for i, n in enumerate(whole.numbers)}
        for n, (inputs, _) in zip(part.numbers, part):
            assert torch.equal(inputs, whole[place[n]][0])
