"""Mixed precision of an optimisation step (autocast)."""
import math
from contextlib import nullcontext

import torch

from ..errors import UsageError

_LEAST_SCALE = 2.0**-10
DTYPES = dict(bfloat16=torch.bfloat16, float16=torch.float16)


def check_autocast(name):
    """Raise UsageError where a name is none of DTYPES, nor None."""
    if name is not None and name not in DTYPES:
        raise UsageError(f'autocast={name!r} is not known; choose one of {list(DTYPES)} or None')


class Precision:
    """Runs units, and walks their losses back, with matrix products in half precision.

    Quantizers, what leaves the unit, losses, gradients of parameters and the optimiser stay in
    float32. The range of float16 ends early: there `scaler` makes the loss larger before it is
    walked back, and leaves out steps whose gradients overflow.

    Args:
        name (str | None): of DTYPES; None is float32 throughout.
        device (torch.device): where the unit is.
    """

    def __init__(self, name, device):
        self.device, self.dtype = device, DTYPES.get(name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.scaler.scale(torch.zeros((), device=device))  # makes its state, batch or no batch
        self._seen, self.left_out = self.scaler.get_scale(), 0

    def run(self, chain, unit, state):
        """Outputs of the unit and those beside it, tuple[Tensor], in float32."""
        half = self.dtype is not None
        with torch.autocast(self.device.type, self.dtype) if half else nullcontext():
            output, side = chain.run(state, unit.start, unit.stop)
        found = output.tensors + side
        return tuple(t.float() for t in found) if half else found

    def overflows(self):
        """Whether gradients overflow whatever the loss is scaled by; counts steps left out.

        Reads a number from the device, so that a GPU is waited for.
        """
        scale = self.scaler.get_scale()
        if scale < self._seen:  # halved by each step that is left out
            self.left_out += round(math.log2(self._seen / scale))
        self._seen = scale
        return scale < _LEAST_SCALE
