"""Random masks belong to an image, whatever batch it is in."""
import pytest
import torch

from pfcr_mm.reconstruction.noise import ImageNoise, seed_of


def drawn(numbers, sizes, shapes=((40, ), (20, 3)), use='inside', step=0, seed=7, share=0.5):
    """Masks for values with `sizes` rows an image, one value a shape of a row."""
    noise = ImageNoise(seed)
    noise.begin(use, step, numbers, sizes)
    return [noise(torch.zeros(sum(sizes), *shape), share) for shape in shapes]


def test_an_image_has_its_numbers_in_any_batch():
    together, alone = drawn([4, 9, 2], [1, 3, 2]), drawn([9], [3])
    for whole, part in zip(together, alone):
        assert torch.equal(whole[1:4], part)
    assert not torch.equal(together[0][:1], together[0][1:2])


def test_windows_of_an_image_stay_together():
    """A value may have several rows for each row of the batch, image by image."""
    noise = ImageNoise(0)
    noise.begin('inside', 0, [3, 5], [1, 1])
    whole = noise(torch.zeros(8, 20), 0.5)
    noise.begin('inside', 0, [5], [1])
    assert torch.equal(whole[4:], noise(torch.zeros(4, 20), 0.5))


def test_seed_step_and_use_count():
    base = drawn([1], [1])[0]
    for other in (dict(use='input'), dict(step=1), dict(seed=8)):
        assert not torch.equal(base, drawn([1], [1], **other)[0])
    assert torch.equal(base, drawn([1], [1])[0])


@pytest.mark.parametrize(
    'share, bound', [(0.5, 128), (0.75, 192), (0.7, 179), (1e-4, 1), (0.9999, 255)])
def test_shares(share, bound):
    mask, = drawn([0, 1], [1000, 1000], shapes=((50, ), ), share=share)
    assert mask.dtype is torch.uint8 and set(mask.unique().tolist()) == {0, 1}
    wanted = bound / 256
    assert abs(mask.float().mean() - wanted) < 4 * (wanted * (1 - wanted) / mask.numel())**0.5


def test_all_and_none():
    for share in (0, 1, 0.0, 1.0):
        assert (drawn([3], [4], share=share)[0] == share).all()


def test_neighbours_are_independent():
    mask, = drawn([0], [1], shapes=((80001, ), ))
    signs = 2.0 * mask.view(-1) - 1
    for apart in (1, 2, 7, 8, 16):
        assert abs((signs[apart:] * signs[:-apart]).mean()) < 4 / len(signs)**0.5


def test_any_number_of_elements_and_layout():
    for shape in ((1, ), (7, ), (3, 3), (0, )):
        assert drawn([2], [1], shapes=(shape, ))[0].shape == (1, *shape)
    noise = ImageNoise(0)
    noise.begin('inside', 0, [0, 1], [1, 1])
    assert noise(torch.zeros(5, 2).mT, 0.5).is_contiguous()


def test_a_value_without_images_is_drawn_all_the_same():
    noise = ImageNoise(0)
    noise.begin('inside', 0, [0, 1], [1, 1])
    assert noise(torch.zeros(3, 5), 0.5).shape == (3, 5)


def test_seeds_are_of_all_facts():
    assert seed_of(1, 'a', 2) == seed_of(1, 'a', 2) < 2**32
    facts = ((1, 'a', 2), (1, 'a', 3), (1, 'b', 2), (2, 'a', 2))
    assert len({seed_of(*each) for each in facts}) == 4
