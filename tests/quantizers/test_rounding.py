"""Weight rounding: nearest, latent, AdaRound."""
import math

import pytest
import torch

from pfcr_mm.errors import UsageError
from pfcr_mm.quantizers import QuantizerSpec, build_quantizer, build_rounding

SATURATION = math.log(11)  # |v| from which the rectified sigmoid is 0 or 1


def weight_quantizer(bits=3, scale=0.1, zero=3.0, rows=4):
    quantizer = build_quantizer(QuantizerSpec(bits=bits, granularity='channel'), rows, 0)
    quantizer.set_scale(torch.full((rows, ), scale), torch.full((rows, ), zero))
    quantizer.enabled = True
    return quantizer


@pytest.fixture()
def weight():
    return torch.rand(4, 50) * 0.68 - 0.29  # inside the grid -0.3 ... 0.4


@pytest.mark.parametrize('name', ['nearest', 'latent', 'adaround'])
def test_off_gives_the_weight_itself(name, weight):
    quantizer = weight_quantizer()
    quantizer.enabled = False
    assert build_rounding(name)(weight, quantizer) is weight


@pytest.mark.parametrize('name', ['nearest', 'latent', 'adaround'])
def test_before_learning_all_round_to_nearest(name, weight):
    quantizer = weight_quantizer()
    rounding = build_rounding(name)
    assert torch.equal(rounding(weight, quantizer), quantizer(weight))
    assert torch.equal(rounding.harden(weight, quantizer), quantizer.encode(weight))


def test_latent_passes_the_gradient_straight_through():
    rounding, quantizer = build_rounding('latent'), weight_quantizer()
    weight = torch.tensor([[0.11, 0.27, 5.0, -5.0]] * 4, requires_grad=True)
    (rounding(weight, quantizer) * torch.arange(1., 5)).sum().backward()
    assert weight.grad[0].tolist() == [1, 2, 0, 0]
    assert rounding.learns_weight


def test_nearest_learns_nothing(weight):
    rounding = build_rounding('nearest')
    assert rounding.open(weight, weight_quantizer()) == [] and not rounding.learns_weight


def test_adaround_starts_at_the_float_weight(weight):
    """Inside the clip range, and where no variable is pulled back by `reopen`."""
    rounding, quantizer = build_rounding(dict(type='adaround', reopen=9.0)), weight_quantizer()
    rounding.open(weight, quantizer)
    torch.testing.assert_close(rounding(weight, quantizer), weight, atol=1e-6, rtol=0)


def test_adaround_start_is_clipped_outside_the_range():
    rounding, quantizer = build_rounding('adaround'), weight_quantizer()
    weight = torch.tensor([[-2.0, 2.0]] * 4)
    rounding.open(weight, quantizer)
    assert rounding(weight, quantizer)[0].tolist() == pytest.approx([-0.3, 0.4])


def test_adaround_variable_by_hand(weight):
    # fraction 0.5 is v = 0; fraction 0.25: -ln(1.2 / 0.35 - 1)
    rounding = build_rounding('adaround')
    rounding.open(torch.tensor([[0.15, 0.125]] * 4), weight_quantizer())
    assert rounding.v[0].tolist() == pytest.approx([0, -math.log(1.2 / 0.35 - 1)], abs=1e-5)
    assert rounding.rectified()[0].tolist() == pytest.approx([0.5, 0.25], abs=1e-5)


def test_adaround_saturates():
    rounding = build_rounding('adaround')
    rounding.v = torch.nn.Parameter(torch.tensor([-3.0, -SATURATION, 0, SATURATION, 3.0]))
    h = rounding.rectified()
    assert h.tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-6)
    h.sum().backward()
    assert rounding.v.grad[[0, 4]].tolist() == [0, 0]
    assert rounding.v.grad[2].item() == pytest.approx(1.2 * 0.25)


def test_adaround_reopens_saturated_variables(weight):
    rounding, quantizer = build_rounding('adaround'), weight_quantizer()
    v, = rounding.open(weight, quantizer)
    with torch.no_grad():
        v.copy_(torch.linspace(-5, 5, v.numel()).view_as(v))
    rounding.close()
    hard = rounding(weight, quantizer)
    again, = rounding.open(weight, quantizer)
    assert again is v and v.abs().max().item() == pytest.approx(2.2)
    assert v.abs().max() < SATURATION
    rounding(weight, quantizer).square().sum().backward()
    assert (v.grad[(weight / 0.1).floor() > -3] != 0).any()
    rounding.close()
    assert torch.equal(rounding(weight, quantizer), hard)  # no decision was changed


def test_adaround_is_hard_when_closed(weight):
    rounding, quantizer = build_rounding('adaround'), weight_quantizer()
    v, = rounding.open(weight, quantizer)
    with torch.no_grad():
        v.normal_()
        v[0, 0] = 0
    rounding.close()
    codes = (torch.floor(weight / quantizer.scale[:, None]) + (v >= 0) + 3).clamp(0, 7)
    assert torch.equal(rounding(weight, quantizer), quantizer.decode(codes))
    assert torch.equal(rounding.harden(weight, quantizer), codes)
    assert not torch.equal(codes, quantizer.encode(weight))


def test_adaround_gradients_reach_v_and_the_scale_but_not_the_weight(weight):
    rounding, quantizer = build_rounding('adaround'), weight_quantizer()
    weight.requires_grad_(True)
    quantizer.log_scale.requires_grad_(True)
    v, = rounding.open(weight.detach(), quantizer)
    rounding(weight, quantizer).sum().backward()
    assert weight.grad is None
    # d w / d v = s h'(v) where the code is not clipped
    s = torch.sigmoid(v)
    torch.testing.assert_close(v.grad, 0.1 * 1.2 * s * (1 - s), rtol=1e-4, atol=1e-7)
    assert (quantizer.log_scale.grad != 0).all()


def test_adaround_regulariser_by_hand():
    rounding = build_rounding(dict(type='adaround', weight_of_loss=0.5, warmup=0.2))
    rounding.v = torch.nn.Parameter(torch.tensor([0.0, 9.0, -math.log(1.2 / 0.35 - 1)]))
    assert rounding.regularisation(0.1) == 0
    # h = .5, 1, .25; |2h - 1| = 0, 1, .5; beta 20 at the end of the warm-up, then to 2
    for progress, beta in ((0.2, 20), (0.6, 11), (1.0, 2)):
        want = 0.5 * (1 + 0 + (1 - 0.5**beta)) / 3
        assert rounding.regularisation(progress).item() == pytest.approx(want, rel=1e-5)


def test_adaround_regulariser_pushes_to_the_nearer_integer():
    rounding = build_rounding('adaround')
    rounding.v = torch.nn.Parameter(torch.tensor([-0.5, 0.5]))
    rounding.regularisation(1.0).backward()
    assert rounding.v.grad[0] > 0 > rounding.v.grad[1]  # descent: down goes down, up goes up


def test_unknown_rounding():
    with pytest.raises(UsageError, match="rounding='stochastic'.*'adaround'"):
        build_rounding('stochastic')
