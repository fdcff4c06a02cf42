"""Reconstruction losses against values computed by hand."""
import pytest
import torch

from pfcr_mm.registry import RECONSTRUCTION_LOSSES

LOSSES = ('mse', 'channel_mse', 'norm_mse')


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
    target = target / target.std(-1, correction=0, keepdim=True)  # all tokens on one scale
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


def test_norm_mse_by_hand():
    """Deviations of the tokens are 1 and 10; divided by them both channels have variance 1."""
    target = torch.tensor([[[1.0, 3.0], [-10.0, 10.0]]])  # as seen: 1, 3 and -1, 1
    loss = build('norm_mse', [(target, )])
    off = target + torch.tensor([[[0.5, 0.0], [0.0, 5.0]]])
    assert loss((off, ), (target, )).item() == pytest.approx((0.25 + 0.25) / 4)


def test_norm_mse_sees_all_tokens_on_one_scale():
    """One token's massive activation hides nothing in the others, which channel_mse forgets."""
    torch.manual_seed(0)
    plain = torch.randn(4, 50, 8)
    massive = plain.clone()
    massive[:, 7, 3] = 1000.0
    error = torch.zeros_like(plain)
    error[:, :5, 3] = 1.0  # in the channel of the massive one, elsewhere
    found = {
        (name, kind): build(name, [(target, )])((target + error, ), (target, )).item()
        for name in ('channel_mse', 'norm_mse')
        for kind, target in (('plain', plain), ('massive', massive))
    }
    assert found['channel_mse', 'massive'] < 1e-3 * found['channel_mse', 'plain']
    assert found['norm_mse', 'massive'] == pytest.approx(found['norm_mse', 'plain'], rel=0.3)


@pytest.mark.parametrize('axis', [-1, 1])
def test_norm_mse_does_not_see_the_scale_of_a_token(axis):
    target, error = torch.randn(2, 6, 6, 6), torch.randn(2, 6, 6, 6)
    shape = [1, 6, 6, 1] if axis == -1 else [1, 1, 6, 6]
    scales = torch.linspace(1, 3, 36).view(shape)
    loss = build('norm_mse', [(target, )], axis)
    scaled = build('norm_mse', [(scales * target, )], axis)
    torch.testing.assert_close(
        loss((target + error, ), (target, )),
        scaled((scales * (target + error), ), (scales * target, )))


def test_norm_mse_floors_flat_tokens():
    """Padding is as flat as can be: its errors count by a tenth of the mean deviation."""
    target = torch.tensor([[[-1.0, 1.0], [0.0, 0.0]]])  # deviations 1 and 0, mean .5
    loss = build('norm_mse', [(target, )])
    off = target + torch.tensor([[[0.0, 0.0], [0.1, 0.0]]])
    variance = 0.5 - 0.25  # of -1, 0 and of 1, 0
    assert loss((off, ), (target, )).item() == pytest.approx((0.1 / 0.05)**2 / variance / 4)


def test_norm_mse_of_logits_is_channel_mse():
    target = torch.randn(6, 7)
    off = target + torch.randn(6, 7)
    assert build('norm_mse', [(target, )])((off, ), (target, )).item() == \
        build('channel_mse', [(target, )])((off, ), (target, )).item()
