"""Reconstruction losses against values computed by hand."""
import pytest
import torch

from pfcr_mm.registry import RECONSTRUCTION_LOSSES

LOSSES = ('mse', 'channel_mse')


def build(name, targets, axis=-1):
    return RECONSTRUCTION_LOSSES.get(name)(targets, axis)


def test_mse_by_hand():
    target = torch.tensor([[1.0, 3.0]])  # mean square 5
    loss = build('mse', [(target, )])
    assert loss((target + torch.tensor([1.0, 2.0]), ), (target, )).item() == pytest.approx(2.5 / 5)


def test_mse_averages_outputs_of_any_size_equally():
    a, b = torch.full((1, 4), 2.0), torch.full((1, 100), 10.0)
    loss = build('mse', [(a, b)])
    assert loss((a * 1.5, b), (a, b)).item() == pytest.approx(0.25 / 2)


def test_channel_mse_by_hand():
    target = torch.tensor([[0.0, 10.0], [2.0, -10.0]])  # variances 1 and 100
    loss = build('channel_mse', [(target[:1], ), (target[1:], )])
    off = target + torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert loss((off, ), (target, )).item() == pytest.approx((1 / 1 + 25 / 100) / 4)


def test_channel_mse_floors_dead_channels():
    target = torch.tensor([[5.0, -1.0], [5.0, 1.0]])  # variances 0 and 1, mean .5
    loss = build('channel_mse', [(target, )])
    off = target + torch.tensor([[0.1, 0.0], [0.0, 0.0]])
    assert loss((off, ), (target, )).item() == pytest.approx(0.01 / (0.01 * 0.5) / 4, rel=1e-4)


@pytest.mark.parametrize('name', LOSSES)
def test_zero_at_the_target_and_its_gradient_points_home(name):
    targets = [(torch.randn(1, 5, 7), torch.randn(1, 3)) for _ in range(4)]
    loss = build(name, targets)
    assert loss(targets[0], targets[0]).item() == 0
    output = (targets[0][0] + 1).requires_grad_()
    loss((output, targets[0][1]), targets[0]).backward()
    assert (output.grad > 0).all()


@pytest.mark.parametrize('name', LOSSES)
def test_scale_of_the_target_does_not_matter(name):
    target = torch.randn(6, 7)
    off = target + 0.1 * torch.randn(6, 7)
    small = build(name, [(target, )])((off, ), (target, ))
    large = build(name, [(100 * target, )])((100 * off, ), (100 * target, ))
    torch.testing.assert_close(small, large)


@pytest.mark.parametrize('name', LOSSES)
def test_class_tokens_have_a_quarter(name):
    """Errors of the one class token and of all patches count 1 : 3, whatever their number."""
    target = torch.randn(4, 50, 7)
    loss = RECONSTRUCTION_LOSSES.get(name)([(target, )], -1, 1)
    plain = build(name, [(target, )])
    parts = [target.clone() for _ in range(2)]
    parts[0][:, 0] += 1
    parts[1][:, 1:] += 1
    first, rest = (loss((part, ), (target, )).item() for part in parts)
    assert rest == pytest.approx(3 * first)
    both = plain((target + 1, ), (target, )).item()
    assert first + rest == pytest.approx(both) == pytest.approx(
        loss((target + 1, ), (target, )).item())


def test_only_tokens_have_class_tokens():
    """Logits and maps of attention are no rows of tokens."""
    for shape in ((4, 7), (4, 3, 5, 7)):
        target = torch.randn(shape)
        loss = RECONSTRUCTION_LOSSES.get('mse')([(target, )], -1, 1)
        off = target.clone()
        off[:, 0] += 1
        assert loss((off, ), (target, )).item() == pytest.approx(
            build('mse', [(target, )])((off, ), (target, )).item())


def test_channel_axis_of_maps():
    target = torch.randn(2, 3, 4, 5) * torch.tensor([1.0, 10, 100]).view(1, 3, 1, 1)
    off = target.clone()
    off[:, 2] += 100  # one standard deviation of one channel in three
    loss = build('channel_mse', [(target, )], axis=1)
    assert loss((off, ), (target, )).item() == pytest.approx(1 / 3, rel=0.5)
