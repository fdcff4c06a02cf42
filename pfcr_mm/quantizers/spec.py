"""`QuantizerSpec`: what a quantizer is, before it has seen any data."""
from dataclasses import dataclass

from ..errors import UsageError

BITS = range(2, 9)
GRANULARITIES = ('tensor', 'channel', 'head')


def check_bits(bits, key='bits'):
    """Return `bits`, or raise UsageError when it is not an integer from 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise UsageError(f'{key}={bits!r} is out of range; choose an integer from 2 to 8')
    return bits


@dataclass(frozen=True)
class QuantizerSpec:
    """Kind, width and granularity of a quantizer.

    Args:
        kind (str): a name of the QUANTIZERS table: 'uniform', 'log2', 'log_sqrt2',
            'adalog'.
        bits (int): 2 to 8.
        symmetric (bool): uniform only; codes are signed and the zero point is 0.
        granularity (str): 'tensor', 'channel' (one scale a channel) or 'head'
            (one scale an attention head).
        integer_zero_point (bool): False takes a zero point between two integers, as published
            code has after reparameterisation; the quantizer then has 2**bits + 1 levels.
        zero_below (bool): log quantizers only. True spends the last code on
            exact zero; False saturates at the smallest power.
        shift (float): log quantizers only. Added before and subtracted after, for values that
            are at least -shift: 0.17 after a GELU.
    """

    kind: str = 'uniform'
    bits: int = 8
    symmetric: bool = False
    granularity: str = 'tensor'
    zero_below: bool = True
    integer_zero_point: bool = True
    shift: float = 0.0

    def __post_init__(self):
        check_bits(self.bits)
        if not isinstance(self.shift, (int, float)) or not 0 <= self.shift < 100:
            raise UsageError(f'shift={self.shift!r} is out of range; choose a number from 0 to 100')
        if self.granularity not in GRANULARITIES:
            raise UsageError(
                f'granularity={self.granularity!r} is not known; choose one of {GRANULARITIES}')
