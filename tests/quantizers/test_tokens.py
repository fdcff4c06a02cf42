"""The quantizer of class tokens: about a centre, with a step of their own."""
import torch

from pfcr_mm.quantizers import QuantizerSpec, TokenQuantizer


def test_by_hand():
    quantizer = TokenQuantizer(QuantizerSpec(bits=2), tokens=1, channels=2)
    quantizer.set_scale(torch.tensor([0.5]), torch.tensor([2.0]))  # -1, -0.5, 0, 0.5
    quantizer.centre.copy_(torch.tensor([[10.0, -3.0]]))
    x = torch.tensor([[[10.3, -3.9]], [[9.2, 5.0]]])
    found = quantizer.from_grid(quantizer.fake_quantize(quantizer.to_grid(x)))
    torch.testing.assert_close(found, torch.tensor([[[10.5, -4.0]], [[9.0, -2.5]]]))


def test_widths_stretch_the_grid_of_each_channel():
    quantizer = TokenQuantizer(QuantizerSpec(bits=2), tokens=1, channels=2)
    quantizer.set_scale(torch.tensor([0.5]), torch.tensor([2.0]))
    widths = torch.tensor([2.0, 0.1])
    x = torch.tensor([[[0.9, 0.04]]])
    found = quantizer.from_grid(quantizer.fake_quantize(quantizer.to_grid(x, widths)), widths)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.05]]]))


def test_each_token_has_a_grid_of_its_own():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.01, 3.0])[:, None]
    tokens = 50 + spread * torch.randn(64, 2, 8, generator=generator)
    quantizer = TokenQuantizer(QuantizerSpec(bits=4), tokens=2, channels=8)
    weight = torch.randn(5, 8, generator=generator)
    error = quantizer.fit(tokens, weight)
    ratio = quantizer.scale[1] / quantizer.scale[0]
    assert 200 < ratio < 450
    torch.testing.assert_close(quantizer.centre, tokens.mean(0))
    signal = ((tokens - tokens.mean(0)) @ weight.t()).square().mean((0, 2))
    assert (error < 0.02 * signal).all()  # 4 bits of a normal distribution have 20 dB


def test_tokens_that_never_vary():
    tokens = torch.full((4, 1, 3), 7.0)
    quantizer = TokenQuantizer(QuantizerSpec(bits=3), tokens=1, channels=3)
    assert quantizer.fit(tokens, torch.eye(3)).item() < 1e-10
    found = quantizer.from_grid(quantizer.fake_quantize(quantizer.to_grid(tokens)))
    torch.testing.assert_close(found, tokens)
