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


def test_empty_batch():
    matmul = QuantMatmul(LOG, HEAD, 2)
    for quantizer in (matmul.left_quantizer, matmul.right_quantizer):
        quantizer.set_scale(torch.ones(2))
        quantizer.enabled = True
    assert matmul(torch.rand(0, 2, 5, 5), torch.rand(0, 2, 5, 3)).shape == (0, 2, 5, 3)
