"""What attention attends to: where values are best centred."""
import torch

from .. import parallel
from ..models.head_folds import free_heads
from ..modules import QuantMatmul, set_quantization


class AttendedValues:
    """Means of values, weighted by the squares of the attention they get.

    Weights of attention are quantized with an error that is relative to them. Summed over
    keys, such errors a_j e_j hurt the least where values v_j have sum_j a_j^2 v_j = 0.

    Use as a context manager around float passes, and call `begin_image` before each; on exit
    the sums of all processes are put together.

    Args:
        model (nn.Module): a quantized model; quantizers are switched off.
    """

    def __init__(self, model):
        self.model = model
        self._sums = {}

    def __enter__(self):
        set_quantization(self.model, False, False)
        self._handles = [
            free.attention.matmul_av.register_forward_pre_hook(self._see(name))
            for name, free in free_heads(self.model).items()
            if hasattr(free.attention, 'value_mean')
            and isinstance(getattr(free.attention, 'matmul_av', None), QuantMatmul)]
        return self

    def __exit__(self, error, *_):
        for handle in self._handles:
            handle.remove()
        if error is None:
            self._sums = {name: [parallel.total(part) for part in parts]
                          for name, parts in self._sums.items()}

    def begin_image(self, number):
        """An image comes; which one does not matter."""

    @property
    def means(self):
        """dict[str, Tensor]: (C,), heads in turn, by the name of each attention whose values
        can be centred, and that ran."""
        return {name: (values / weights.clamp(min=1e-30)).flatten().float()
                for name, (values, weights) in self._sums.items() if torch.is_tensor(weights)}

    def _see(self, name):
        self._sums[name] = [0.0, 0.0]

        def hook(matmul, args):
            attention, values = args  # (B, heads, N, N), (B, heads, N, C)
            valid = matmul.left_quantizer.valid_rows
            if valid is not None:  # padded queries say nothing of the image
                attention = attention.unflatten(0, (-1, len(valid))) * valid[:, None, :, None]
                attention = attention.flatten(0, 1)
            # of each key, (B, heads, N, 1); head by head, for maps may be large
            squares = torch.stack(
                [weights.square().sum(-2) for weights in attention.unbind(1)], 1)[..., None]
            for place, part in enumerate(((squares * values).sum((0, 2)), squares.sum((0, 2)))):
                # sums of such numbers are exact in double, and the same in any order
                self._sums[name][place] = self._sums[name][place] + part.float().cpu().double()

        return hook
