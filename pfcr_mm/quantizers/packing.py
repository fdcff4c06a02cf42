"""Integers at their real bit width: b-bit codes back to back in bytes."""
import torch


def pack_codes(codes, bits):
    """Pack unsigned integers below 2**bits, least significant bit first.

    Args:
        codes (Tensor): integers of any shape.
        bits (int): 2 to 8.

    Returns:
        Tensor: uint8, shape (ceil(numel * bits / 8),).
    """
    codes = codes.flatten().to(torch.int16)
    if codes.numel() and (codes.min() < 0 or codes.max() >= 2**bits):
        raise ValueError(f'codes must lie in 0..{2**bits - 1}')
    places = torch.arange(bits, dtype=torch.int16)
    stream = ((codes[:, None] >> places) & 1).to(torch.uint8).flatten()
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack_codes(packed, bits, shape):
    """Inverse of `pack_codes`; int16 of the given shape."""
    count = torch.Size(shape).numel()
    if packed.numel() != -(-count * bits // 8):
        raise ValueError(f'{packed.numel()} bytes cannot hold {count} codes of {bits} bits')
    stream = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
    stream = stream[:count * bits].view(count, bits).to(torch.int16)
    return (stream << torch.arange(bits, dtype=torch.int16)).sum(1).to(torch.int16).view(shape)
