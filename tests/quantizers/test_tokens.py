"""The quantizer of class tokens: about a centre, with a step of their own."""
import torch

from pfcr_mm.quantizers import QuantizerSpec, TokenQuantizer


def quantizer_of_two_channels():
    quantizer = TokenQuantizer(QuantizerSpec(bits=2), tokens=1, channels=2, outputs=1)
    quantizer.set_scale(torch.tensor([0.5]), torch.tensor([2.0]))  # -1, -0.5, 0, 0.5
    quantizer.enabled = True
    return quantizer


def test_by_hand():
    quantizer = quantizer_of_two_channels()
    quantizer.centre.copy_(torch.tensor([[10.0, -3.0]]))
    found = quantizer.about_centre(torch.tensor([[[10.3, -3.9]], [[9.2, 5.0]]]))
    torch.testing.assert_close(found, torch.tensor([[[0.5, -1.0]], [[-1.0, 0.5]]]))


def test_widths_stretch_the_grid_of_each_channel():
    found = quantizer_of_two_channels().about_centre(
        torch.tensor([[[0.9, 0.04]]]), torch.tensor([2.0, 0.1]))
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.05]]]))


def test_off_nothing_but_the_centre_is_taken():
    quantizer = quantizer_of_two_channels()
    quantizer.centre.fill_(1.0)
    quantizer.enabled = False
    x = torch.tensor([[[0.9, 0.04]]])
    assert torch.equal(quantizer.about_centre(x), x - 1)


def test_each_token_has_a_grid_and_a_bias_of_its_own():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.01, 3.0])[:, None]
    tokens = 50 + spread * torch.randn(64, 2, 8, generator=generator)
    quantizer = TokenQuantizer(QuantizerSpec(bits=4), tokens=2, channels=8, outputs=5)
    weight, bias = torch.randn(5, 8, generator=generator), torch.arange(5.0)
    error = quantizer.fit(tokens, weight, bias)
    ratio = quantizer.scale[1] / quantizer.scale[0]
    assert 200 < ratio < 450
    torch.testing.assert_close(quantizer.centre, tokens.mean(0))
    outputs = tokens @ weight.t() + bias
    torch.testing.assert_close(quantizer.bias, outputs.mean(0))
    signal = (outputs - outputs.mean(0)).square().mean((0, 2))
    assert (error < 0.02 * signal).all()  # 4 bits of a normal distribution have 20 dB


def test_tokens_that_never_vary():
    tokens = torch.full((4, 1, 3), 7.0)
    quantizer = TokenQuantizer(QuantizerSpec(bits=3), tokens=1, channels=3, outputs=3)
    assert quantizer.fit(tokens, torch.eye(3)).item() < 1e-10
    assert quantizer.about_centre(tokens, quantize=quantizer.fake_quantize).abs().max() < 1e-6
    torch.testing.assert_close(quantizer.bias, tokens[0])
