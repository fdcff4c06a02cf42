"""The quantized product of two activations."""
import pytest
import torch

from pfcr_mm.modules import QuantMatmul
from pfcr_mm.quantizers import QuantizerSpec

HEAD = QuantizerSpec(bits=4, granularity='head')
TENSOR = QuantizerSpec(bits=4)
LOG = QuantizerSpec(kind='log2', bits=4, granularity='head')


def test_off_is_the_plain_product():
    left, right = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4, 6)
    assert torch.equal(QuantMatmul(HEAD, HEAD, 3)(left, right), left @ right)


@pytest.mark.parametrize('left, right, sizes', [
    (HEAD, HEAD, (3, 3)), (TENSOR, HEAD, (1, 3)), (LOG, TENSOR, (3, 1))], ids=str)
def test_number_of_scales(left, right, sizes):
    matmul = QuantMatmul(left, right, 3)
    assert (matmul.left_quantizer.scale.numel(), matmul.right_quantizer.scale.numel()) == sizes


def test_each_head_has_its_own_scale():
    matmul = QuantMatmul(HEAD, HEAD, 2)
    matmul.left_quantizer.set_scale(torch.tensor([1.0, 10.0]))
    matmul.right_quantizer.set_scale(torch.tensor([2.0, 1.0]))
    matmul.left_quantizer.enabled = matmul.right_quantizer.enabled = True
    left = torch.tensor([3.4, 34.0]).view(1, 2, 1, 1)
    right = torch.tensor([3.4, 3.4]).view(1, 2, 1, 1)
    assert matmul(left, right).flatten().tolist() == [3 * 4, 30 * 3]


def test_left_operands_about_a_centre_by_hand():
    """Steps of 1 from -1 to 2, about (10, -3): 0.4 goes to 0, -0.9 to -1, 7 to 2."""
    matmul = QuantMatmul(QuantizerSpec(bits=2, granularity='head'), HEAD, 1)
    matmul.give_centre(2)
    matmul.left_centre.copy_(torch.tensor([10.0, -3.0]))
    left = torch.tensor([[10.4, -3.9], [17.0, -3.0]]).view(1, 1, 2, 2)
    assert torch.allclose(matmul(left, torch.eye(2)), left)
    matmul.left_quantizer.set_scale(torch.ones(1), torch.ones(1))
    matmul.left_quantizer.enabled = True
    assert matmul(left, torch.eye(2)).flatten().tolist() == [10, -4, 12, -3]


def test_a_centre_of_the_left_leaves_the_right_as_it_is():
    matmul = QuantMatmul(HEAD, HEAD, 1)
    matmul.give_centre(1)
    matmul.left_centre.fill_(10.0)
    matmul.right_quantizer.set_scale(torch.ones(1))
    matmul.right_quantizer.enabled = True
    assert matmul(torch.full((1, 1, 1, 1), 12.0), torch.full((1, 1, 1, 1), 2.4)).item() == 24


def test_empty_batch():
    matmul = QuantMatmul(LOG, HEAD, 2)
    for quantizer in (matmul.left_quantizer, matmul.right_quantizer):
        quantizer.set_scale(torch.ones(2))
        quantizer.enabled = True
    assert matmul(torch.rand(0, 2, 5, 5), torch.rand(0, 2, 5, 3)).shape == (0, 2, 5, 3)
