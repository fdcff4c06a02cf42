"""`Quantizer`: state, switching, QDrop, and what a checkpoint holds."""
import pytest
import torch

from pfcr_mm.errors import UsageError
from pfcr_mm.quantizers import QuantizerSpec, build_quantizer

KINDS = ('uniform', 'log2', 'log_sqrt2', 'adalog')


def ready(kind='uniform', bits=4, scale=(0.1, ), zero=None, axis=None, **spec):
    quantizer = build_quantizer(dict(kind=kind, bits=bits, **spec), len(scale), axis)
    quantizer.set_scale(torch.tensor(scale), None if zero is None else torch.tensor(zero))
    quantizer.enabled = True
    return quantizer


@pytest.mark.parametrize('kind', KINDS)
def test_off_returns_the_very_input(kind):
    quantizer = build_quantizer(dict(kind=kind, bits=2))
    x = torch.rand(3, 4)
    assert quantizer(x) is x


@pytest.mark.parametrize('kind', KINDS)
def test_on_without_scales_raises(kind):
    quantizer = build_quantizer(dict(kind=kind, bits=2))
    quantizer.enabled = True
    with pytest.raises(RuntimeError, match='never calibrated'):
        quantizer(torch.rand(3))


@pytest.mark.parametrize('scale', [0.0, -1.0, float('nan'), float('inf')])
def test_bad_scales_are_refused(scale):
    quantizer = build_quantizer(QuantizerSpec())
    with pytest.raises(ValueError, match='positive and finite'):
        quantizer.set_scale(torch.tensor([scale]))
    assert not quantizer.calibrated


def test_scales_run_along_the_axis():
    quantizer = ready(scale=(1.0, 10.0), zero=(0.0, 2.0), axis=1)
    x = torch.tensor([[3.4, 14.0], [99.0, -99.0]])
    assert quantizer(x).tolist() == [[3, 10], [15, -20]]


def test_encode_then_decode_is_fake_quantize():
    quantizer = ready(scale=(0.3, ), zero=(7.0, ))
    x = torch.randn(1000)
    codes = quantizer.encode(x)
    assert torch.equal(codes, codes.round()) and codes.min() == 0 and codes.max() == 15
    assert torch.equal(quantizer.decode(codes), quantizer(x))


def test_log_scale_gets_the_scale_gradient_times_the_scale():
    quantizer = ready(scale=(0.5, ), zero=(1.0, ), bits=2)
    quantizer.log_scale.requires_grad_(True)
    quantizer(torch.tensor([0.3, 9.0, -2.0])).sum().backward()
    assert quantizer.log_scale.grad.item() == pytest.approx(0.5 * (0.4 + 2 - 1))


@pytest.mark.parametrize('kind, bits', [
    (kind, bits) for kind in KINDS for bits in range(2, 9)
    if bits < 8 or kind in ('uniform', 'log_sqrt2')  # float32 has no 2**-254
])
def test_levels_of_the_module(kind, bits):
    if kind == 'uniform':
        quantizer = ready(kind, bits, (2.0**-bits, ), (float(2**bits // 3), ))
        x = torch.linspace(-2, 2, 20_001)
    else:
        torch.set_flush_denormal(False)  # a runner built by an earlier test flushes 2**-127
        quantizer = ready(kind, bits, (1.0, ))
        x = torch.cat([torch.exp2(torch.linspace(1, -128, 20_001)), torch.zeros(1)])
    levels = quantizer(x).unique()
    assert levels.numel() == 2**bits
    torch.testing.assert_close(quantizer.levels(), levels[None])


@pytest.mark.parametrize('share', [0.0, 0.25, 0.5, 0.9])
def test_keep_prob_mixes_quantized_and_float(share):
    quantizer = ready(scale=(1.0, ), zero=(8.0, ))
    quantizer.keep_prob = share
    x = torch.rand(20_000) * 0.2 + 0.2  # every value rounds to zero
    out = quantizer(x)
    kept = out == 0
    assert torch.equal(out[~kept], x[~kept])
    assert kept.float().mean().item() == pytest.approx(share, abs=0.02)


def test_keep_prob_one_is_plain_quantization():
    quantizer = ready(scale=(1.0, ))
    x = torch.rand(100) * 9
    assert torch.equal(quantizer(x), quantizer.fake_quantize(x))


def test_state_of_a_calibrated_quantizer_round_trips():
    source = ready(scale=(0.25, 0.5), zero=(3.0, 4.0), axis=-1)
    target = build_quantizer(source.spec, 2, -1)
    target.load_state_dict(source.state_dict())
    x = torch.randn(6, 2)
    assert target.enabled and target.calibrated
    assert torch.equal(target(x), source(x))


def test_state_of_adalog_round_trips():
    source = build_quantizer(QuantizerSpec(kind='adalog', shift=0.17), 2, -1)
    source.set_grid(torch.tensor([2.0, 3.0]), torch.tensor([1.5, 40.0]))
    assert set(source.state_dict()) == set(source.state_keys) \
        == {'log_scale', 'zero_point', 'steps_per_octave'}
    target = build_quantizer(source.spec, 2, -1)
    target.load_state_dict(source.state_dict())
    x = torch.randn(50, 2)
    assert torch.equal(target(x), source.fake_quantize(x))


@pytest.mark.parametrize('steps', [0.0, -2.0, float('nan'), float('inf')])
def test_bad_steps_are_refused(steps):
    with pytest.raises(ValueError, match='steps an octave must be positive and finite'):
        build_quantizer(dict(kind='adalog')).set_grid(torch.ones(1), torch.tensor([steps]))


@pytest.mark.parametrize('kind', ['log2', 'log_sqrt2', 'adalog'])
def test_shifted_levels(kind):
    """After a GELU: the least level is -shift, and every level stays itself."""
    quantizer = ready(kind, 4, (5.0, ), shift=0.17)
    levels = quantizer.levels()[0]
    assert levels.tolist() == sorted(levels) and levels[0].item() == pytest.approx(-0.17)
    assert levels[-1].item() == pytest.approx(4.83)
    torch.testing.assert_close(quantizer(levels), levels)


@pytest.mark.parametrize('shift', [-0.1, 'x', None, float('nan'), float('inf')])
def test_a_bad_shift(shift):
    with pytest.raises(UsageError, match='shift=.* is out of range'):
        QuantizerSpec(kind='adalog', shift=shift)


def test_uncalibrated_quantizer_saves_nothing_and_float_state_leaves_it_off():
    quantizer = build_quantizer(QuantizerSpec())
    assert quantizer.state_dict() == {}
    quantizer.load_state_dict({})  # strict
    assert not quantizer.enabled and not quantizer.calibrated


@pytest.mark.parametrize('bits', [1, 9, 0, -4, 4.0, '4', True, None])
def test_bits_out_of_range(bits):
    with pytest.raises(UsageError, match='bits=.* choose an integer from 2 to 8'):
        QuantizerSpec(bits=bits)


def test_unknown_kind_and_granularity():
    with pytest.raises(UsageError, match=r"kind='log3' is not a known quantizer.*'log_sqrt2'"):
        build_quantizer(dict(kind='log3'))
    with pytest.raises(UsageError, match="granularity='row'"):
        QuantizerSpec(granularity='row')


def test_repr_tells_the_spec():
    assert 'bits=3' in repr(build_quantizer(dict(kind='log2', bits=3), 4, 1))
