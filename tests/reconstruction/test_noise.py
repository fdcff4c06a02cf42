"""Random numbers belong to an image, whatever batch it is in."""
import torch

from pfcr_mm.reconstruction.noise import ImageNoise, seed_of


def drawn(numbers, sizes, shapes=((4, ), (2, 3)), use='inside', step=0, seed=7):
    """Numbers for values with `sizes` rows an image, one value a shape of a row."""
    noise = ImageNoise(seed)
    noise.begin(use, step, numbers, sizes)
    return [noise(torch.zeros(sum(sizes), *shape)) for shape in shapes]


def test_an_image_has_its_numbers_in_any_batch():
    together, alone = drawn([4, 9, 2], [1, 3, 2]), drawn([9], [3])
    for whole, part in zip(together, alone):
        assert torch.equal(whole[1:4], part)
    assert not torch.equal(together[0][:1], together[0][1:2])


def test_windows_of_an_image_stay_together():
    """A value may have several rows for each row of the batch, image by image."""
    noise = ImageNoise(0)
    noise.begin('inside', 0, [3, 5], [1, 1])
    whole = noise(torch.zeros(8, 2))
    noise.begin('inside', 0, [5], [1])
    assert torch.equal(whole[4:], noise(torch.zeros(4, 2)))


def test_seed_step_and_use_count():
    base = drawn([1], [1])[0]
    for other in (dict(use='input'), dict(step=1), dict(seed=8)):
        assert not torch.equal(base, drawn([1], [1], **other)[0])
    assert torch.equal(base, drawn([1], [1])[0])


def test_numbers_are_uniform():
    values = drawn([0, 1], [2000, 2000])[0]
    assert 0 <= values.min() and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02 and abs(values.var() - 1 / 12) < 0.01


def test_a_value_without_images_is_drawn_all_the_same():
    noise = ImageNoise(0)
    noise.begin('inside', 0, [0, 1], [1, 1])
    assert noise(torch.zeros(3, 5)).shape == (3, 5)


def test_seeds_are_of_all_facts():
    assert seed_of(1, 'a', 2) == seed_of(1, 'a', 2) < 2**32
    facts = ((1, 'a', 2), (1, 'a', 3), (1, 'b', 2), (2, 'a', 2))
    assert len({seed_of(*each) for each in facts}) == 4
