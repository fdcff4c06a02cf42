"""Quantizers and packing, whatever the numbers."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfcr_mm.errors import UsageError
from pfcr_mm.quantizers import QuantizerSpec, build_quantizer, search
from pfcr_mm.quantizers.packing import pack_codes, unpack_codes

BITS = st.integers(2, 8)
SHAPES = st.lists(st.integers(0, 7), max_size=4)
# pfcr_mm switches denormal numbers off, which hypothesis minds
FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
FEW = settings(max_examples=150)


@FEW
@given(BITS, SHAPES, st.integers(0, 2**32))
def test_packing_round_trip(bits, shape, seed):
    codes = torch.randint(2**bits, tuple(shape), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, codes.shape).long(), codes)


@FEW
@given(BITS, st.integers(0, 60), st.integers(-5, 5))
def test_packed_bytes_of_another_number_are_refused(bits, count, off):
    size = -(-count * bits // 8) + off
    if size < 0 or off == 0:
        return
    with pytest.raises(ValueError, match='cannot hold'):
        unpack_codes(torch.zeros(size, dtype=torch.uint8), bits, (count, ))


def calibrated(values, bits, symmetric, method):
    spec = QuantizerSpec(bits=bits, symmetric=symmetric)
    quantizer = build_quantizer(spec)
    quantizer.set_scale(*search.search_range(values[None], spec, method))
    quantizer.enabled = True
    return quantizer


@FEW
@given(st.lists(FLOATS, min_size=1, max_size=40), BITS, st.booleans(),
       st.sampled_from(['minmax', 'mse', 'percentile']))
def test_uniform_round_trip(values, bits, symmetric, method):
    x = torch.tensor(values)
    quantizer = calibrated(x, bits, symmetric, method)
    low, high = quantizer.code_range
    codes = quantizer.encode(x)
    assert torch.equal(codes, codes.round()) and low <= codes.min() and codes.max() <= high
    assert quantizer.zero_point == quantizer.zero_point.round()
    # values of the grid stay, codes come back, and the forward pass is both in one
    on_grid = quantizer.decode(codes)
    assert torch.equal(quantizer.encode(on_grid), codes)
    assert torch.allclose(quantizer(x), on_grid, rtol=1e-6, atol=0)
    assert len(quantizer(x).unique()) <= 2**bits
    if method == 'minmax' and not symmetric:
        assert ((on_grid - x).abs() <= quantizer.scale * 1.0001 + 1e-6 * x.abs()).all()
    packed = pack_codes(codes - low, bits)
    assert torch.equal(unpack_codes(packed, bits, codes.shape) + low, codes)


@FEW
@given(st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=1, max_size=40), BITS,
       st.sampled_from(['log2', 'log_sqrt2', 'adalog']), st.booleans())
def test_logarithmic_values_stay_on_the_grid(values, bits, kind, zero_below):
    quantizer = build_quantizer(QuantizerSpec(kind=kind, bits=bits, zero_below=zero_below))
    quantizer.set_scale(torch.ones(1))
    quantizer.enabled = True
    once = quantizer(torch.tensor(values))
    assert torch.isfinite(once).all() and (once >= 0).all() and len(once.unique()) <= 2**bits
    assert torch.allclose(quantizer(once), once)


@FEW
@given(st.one_of(st.none(), st.booleans(), st.floats(allow_subnormal=False),
                 st.text(max_size=3), st.integers(), st.lists(st.integers(), max_size=2)))
def test_bits_are_an_integer_from_two_to_eight(bits):
    if isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8:
        assert QuantizerSpec(bits=bits).bits == bits
    else:
        with pytest.raises(UsageError):
            QuantizerSpec(bits=bits)


@FEW
@given(st.lists(st.one_of(FLOATS, st.sampled_from([float('nan'), float('inf'), -1.0, 0.0])),
                min_size=1, max_size=4))
def test_scales_are_positive_and_finite(values):
    quantizer, scale = build_quantizer(QuantizerSpec(), len(values), 0), torch.tensor(values)
    if torch.isfinite(scale).all() and (scale > 0).all():
        quantizer.set_scale(scale)
        assert torch.allclose(quantizer.scale, scale, rtol=1e-4)
    else:
        with pytest.raises(ValueError, match='positive and finite'):
            quantizer.set_scale(scale)
        assert not quantizer.calibrated
