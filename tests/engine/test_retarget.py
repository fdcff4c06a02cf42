"""Views that a classifier takes for another class."""
import pytest
import torch
from tiny_classifiers import build_classifier, pictures

from pfcr_mm.engine.augment import with_views
from pfcr_mm.engine.retarget import STEP, STEPS, WANTED, retarget

from .test_augment import shard


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def brightness(inputs):
    """Two classes: bright images, and dark ones."""
    mean = inputs.mean((1, 2, 3))
    return torch.stack([mean, -mean], 1) * 20


def test_steps_by_hand():
    """Every pixel goes the same way, a step at a time, as far as its channel's extremes."""
    view = torch.linspace(-1, 1, 3 * 4 * 5).view(1, 3, 4, 5)
    classes = set()
    for seed in range(20):
        draws = torch.rand(2, generator=seeded(seed))
        target, wanted = int(draws[0] * 2), WANTED[0] + (WANTED[1] - WANTED[0]) * draws[1]
        classes.add(target)
        expected = view.clone()
        for _ in range(STEPS):
            if brightness(expected).softmax(1)[0, target] >= wanted:
                break
            expected = expected + STEP * view.std() * (1 - 2 * target)
            expected = expected.clamp(view.amin((2, 3), keepdim=True),
                                      view.amax((2, 3), keepdim=True))
        moved = retarget(view, brightness, seeded(seed))
        assert torch.allclose(moved, expected) and not moved.requires_grad
    assert classes == {0, 1}


def test_where_it_stops():
    """A view that is of the class already stays; none goes on for longer than it may."""
    calls = []

    def stubborn(inputs):
        calls.append(inputs)
        return torch.zeros(1, 50) * inputs.mean()

    view = torch.randn(1, 3, 8, 8, generator=seeded(0))
    assert torch.equal(retarget(view, lambda x: torch.zeros(1, 1) * x.mean(), seeded(0)), view)
    retarget(view, stubborn, seeded(0))
    assert len(calls) == STEPS


def test_a_classifier_takes_views_for_other_classes():
    """Of a real network, with its parameters and gradients left alone."""
    model = build_classifier('vit').requires_grad_(True)
    views = [x[None] for x in pictures('vit', 6)]
    with torch.no_grad():  # as loops run
        moved = [retarget(x, model.logits, seeded(seed)) for seed, x in enumerate(views)]
        gained = []
        for seed, (old, new) in enumerate(zip(views, moved)):
            target = int(torch.rand(2, generator=seeded(seed))[0] * model.logits(old).shape[1])
            before, after = (model.logits(x).softmax(1)[0, target] for x in (old, new))
            gained.append((after - before).item())
            assert (new - old).abs().max() <= STEP * old.std() * STEPS * 1.001
    assert min(gained) >= 0 and max(gained) > 0.05
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_last_views_of_each_image(monkeypatch):
    """Of 9 views 4 further ones; images as they are, and those held out, never."""
    seen = []

    def mark(inputs, logits, generator):
        seen.append(logits)
        return inputs - 100

    monkeypatch.setattr('pfcr_mm.engine.augment.retarget', mark)
    plain = with_views(shard(5), 9, 4, seed=0, cutmix=0.5)
    found = with_views(shard(5), 9, 4, seed=0, cutmix=0.5, retargeted=0.5, logits='logits')
    assert seen == ['logits'] * 16 and found.numbers == plain.numbers
    for place, (old, new) in enumerate(zip(plain, found)):
        moved = 20 <= place < 36
        assert torch.equal(new[0], old[0] - 100 if moved else old[0])


@pytest.mark.parametrize('share, count', [(0.0, 0), (0.1, 0), (0.3, 1), (1.0, 2)])
def test_share_of_views(monkeypatch, share, count):
    seen = []
    monkeypatch.setattr('pfcr_mm.engine.augment.retarget',
                        lambda inputs, logits, generator: seen.append(0) or inputs)
    with_views(shard(2), 3, 1, seed=0, retargeted=share)
    assert len(seen) == count


def test_a_seed_repeats_it():
    model = build_classifier('vit')
    view = pictures('vit', 1)[:1]
    first, again, other = (retarget(view, model.logits, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
