"""Codes at their real bit width."""
import pytest
import torch

from pfcr_mm.quantizers.packing import pack_codes, unpack_codes


def test_by_hand():
    # least significant bit first: 01 10 11 -> bits 1,0 0,1 1,1 -> 1 + 8 + 16 + 32
    assert pack_codes(torch.tensor([1, 2, 3]), 2).tolist() == [57]
    # 5, 3, 7 -> 1,0,1 1,1,0 1,1 | 1 -> 1 + 4 + 8 + 16 + 64 + 128, then 1
    assert pack_codes(torch.tensor([5, 3, 7]), 3).tolist() == [221, 1]


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('shape', [(2**8, ), (7, 3, 5), (1, ), (0, 4)], ids=str)
def test_round_trip(bits, shape):
    codes = torch.randint(2**bits, shape)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, codes.shape), codes.to(torch.int16))


@pytest.mark.parametrize('bits', range(2, 9))
def test_all_codes_survive(bits):
    codes = torch.arange(2**bits)
    assert unpack_codes(pack_codes(codes.float(), bits), bits, codes.shape).tolist() == \
        codes.tolist()


@pytest.mark.parametrize('code', [-1, 4])
def test_code_that_does_not_fit(code):
    with pytest.raises(ValueError, match='0..3'):
        pack_codes(torch.tensor([0, code]), 2)


def test_wrong_number_of_bytes():
    with pytest.raises(ValueError, match='2 bytes cannot hold 3 codes of 2 bits'):
        unpack_codes(torch.zeros(2, dtype=torch.uint8), 2, (3, ))
