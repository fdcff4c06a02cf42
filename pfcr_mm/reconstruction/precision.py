"""Mixed precision of an optimisation step (autocast)."""
import torch

from ..errors import UsageError

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

    def run(self, chain, unit, state):
        """Outputs of the unit and those beside it, tuple[Tensor], in float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            output, side = chain.run(state, unit.start, unit.stop)
        found = output.tensors + side
        return found if self.dtype is None else tuple(t.float() for t in found)
