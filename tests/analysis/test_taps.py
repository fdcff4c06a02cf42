"""What taps measure, against values computed by hand; and that they leave nothing behind."""
import math

import pytest
import torch

from pfcr_mm.analysis.activations import _against_grid, clipped_share, quantiles
from pfcr_mm.analysis.taps import Taps, entropy, grid
from pfcr_mm.modules import quantizers_of
from pfcr_mm.quantizers import QuantizerSpec, build_quantizer


def test_entropy_of_rows():
    rows = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0],
                         [0.0, 0.0, 0.0, 0.0]])
    assert entropy(rows).tolist() == pytest.approx([1.0, 0.0, 0.5, 0.0])  # log 2 / log 4
    assert entropy(3 * rows).tolist() == pytest.approx([1.0, 0.0, 0.5, 0.0])


def test_grid_of_each_kind():
    uniform = build_quantizer(QuantizerSpec(bits=2), 2, 1)
    assert grid(uniform) is None  # no scales yet
    uniform.set_scale(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0]))
    assert torch.allclose(grid(uniform), torch.tensor([[-1.0, 0, 1, 2], [0, 0.5, 1, 1.5]]))
    log = build_quantizer(QuantizerSpec(kind='log2', bits=2))
    log.set_scale(torch.tensor([0.8]))
    assert torch.allclose(grid(log), torch.tensor([[0.0, 0.2, 0.4, 0.8]]))


def test_grid_is_what_the_quantizer_gives():
    x = torch.linspace(-2, 3, 400).view(-1, 1)
    quantizer = build_quantizer(QuantizerSpec(bits=3))
    quantizer.set_scale(torch.tensor([0.37]), torch.tensor([3.0]))
    quantizer.enabled = True
    assert torch.allclose(quantizer(x), nearest(x, grid(quantizer)))


def nearest(values, levels):
    """Each of the values (n, groups) on the nearest level of its group (groups, levels)."""
    distance = (values[..., None] - levels).abs()
    return levels.expand_as(distance).gather(-1, distance.argmin(-1, keepdim=True))[..., 0]


def test_noise_is_that_of_the_quantizer():
    """log2 rounds 0.72 to 1, though 0.5 is nearer: error 0.28, not 0.22."""
    log = build_quantizer(QuantizerSpec(kind='log2', bits=3))
    log.set_scale(torch.tensor([1.0]))
    facts = _against_grid(log, torch.tensor([[0.72]]))
    assert facts['sqnr_db'] == pytest.approx(20 * math.log10(0.72 / 0.28))
    heads = build_quantizer(QuantizerSpec(bits=2, granularity='head'), 2, 1)
    heads.set_scale(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0]))
    facts = _against_grid(heads, torch.tensor([[0.9, 0.6], [-1.3, 0.5]]))  # 1, 0.5; -1, 0.5
    signal, noise = 0.81 + 0.36 + 1.69 + 0.25, 0.01 + 0.01 + 0.09
    assert facts['sqnr_db'] == pytest.approx(10 * math.log10(signal / noise), rel=1e-5)
    assert facts['worst_group'] == 0


def test_clipped_share():
    levels = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    values = torch.tensor([[-1.1], [-0.9], [0.0], [3.9], [4.1]])
    assert clipped_share(values, levels) == pytest.approx(0.4)  # -1.1 and 4.1
    powers = torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    assert clipped_share(torch.tensor([[0.0], [1.0], [1.9], [2.1]]), powers, 0.0) == 0.25


def test_clipped_share_of_a_shifted_grid():
    """One step above is twice the largest power, 2 - 0.17; below it ends at -0.17."""
    adalog = build_quantizer(QuantizerSpec(kind='adalog', bits=2, shift=0.17))
    adalog.set_grid(torch.ones(1), torch.ones(1))
    assert torch.allclose(grid(adalog), torch.tensor([[0.0, 0.25, 0.5, 1.0]]) - 0.17)
    values = torch.tensor([[-0.5], [-0.17], [0.0], [0.9], [1.8], [1.9]])  # -0.5 and 1.9
    facts = _against_grid(adalog, values)
    assert facts['clipped'] == pytest.approx(2 / 6)
    assert (facts['grid_low'], facts['grid_high']) == pytest.approx((-0.17, 0.83))
    assert facts['zeroed'] == 0  # 0 lies between levels: it becomes 0.08


def test_share_that_becomes_zero():
    log = build_quantizer(QuantizerSpec(kind='log2', bits=2))
    log.set_scale(torch.ones(1))  # 0, 1/4, 1/2, 1; zero takes what is a step below 1/4
    values = torch.tensor([[0.0], [0.12], [0.13], [1.0]])
    assert _against_grid(log, values)['zeroed'] == 0.5


def test_quantiles_leave_out_what_is_no_number():
    found = quantiles(torch.tensor([[float('nan')], [1.0], [2.0], [float('inf')]]))
    assert found == pytest.approx([1.001, 1.25, 1.75, 1.999])


def test_taps_see_and_leave(quantized, images):
    hooks = [len(q._forward_hooks) for _, q in quantizers_of(quantized)]
    inputs, samples = images[1]
    with pytest.raises(KeyError):
        with Taps(quantized) as taps:
            quantized.predict(inputs, samples, rescale=False)
            raise KeyError
    assert [len(q._forward_hooks) for _, q in quantizers_of(quantized)] == hooks
    values = taps.seen['backbone.stages.0.blocks.0.ffn.layers.1.input_quantizer'].values()
    assert values.shape[1] == 1 and len(values) > 100 and values.min() < 0  # GELU
    softmax = taps.seen['backbone.stages.0.blocks.0.attn.w_msa.matmul_av.left_quantizer'].values()
    assert softmax.shape[1] == 2 and 0 <= softmax.min() and softmax.max() <= 1
    attention = taps.attention['backbone.stages.0.blocks.0.attn.w_msa']
    assert attention.rows > 0 and (attention.entropy / attention.rows <= 1).all()


def test_entropy_of_a_padded_map_counts_image_rows_alone(quantized, images):
    inputs, samples = images[0]  # 16x16 tokens in windows of 7: 9 windows, 441 places
    with Taps(quantized) as taps:
        quantized.predict(inputs, samples, rescale=False)
    assert taps.attention['backbone.stages.0.blocks.0.attn.w_msa'].rows == 256
