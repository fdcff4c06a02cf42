"""Signal-to-quantization-noise ratio (SQNR)."""
import math

FLOOR = -100.0  # dB


class Noise:
    """Power of a signal and of the error of its quantized twin, summed over many tensors."""

    def __init__(self):
        self.signal = self.noise = 0.0

    def add(self, reference, value):
        """Take one more pair of tensors of the same shape: float, quantized."""
        reference, value = reference.detach().double(), value.detach().double()
        self.signal += reference.square().sum().item()
        self.noise += (value - reference).square().sum().item()

    @property
    def db(self):
        """SQNR so far in dB, as reports have it; see `plain_db`."""
        return plain_db(sqnr_db(self.signal, self.noise))


def sqnr_db(signal, noise):
    """10 log10(signal / noise) of two powers.

    Returns:
        float: in dB; infinity where nothing is lost, minus infinity where there is noise
        without a signal, NaN where a power is no number.

    Example:
        >>> sqnr_db(100.0, 1.0)
        20.0
    """
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * (math.log10(signal) - math.log10(noise))


def plain_db(value):
    """An SQNR that JSON can hold: None where nothing is lost; at least -100 dB.

    A value that is no number counts as -100 dB: nothing of the signal is left.
    """
    if value == math.inf:
        return None
    return FLOOR if math.isnan(value) else max(FLOOR, value)
