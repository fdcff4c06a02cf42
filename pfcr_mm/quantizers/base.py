"""`Quantizer`: the state every quantizer holds, and how it is built from a spec."""
import torch
from torch import nn

from ..registry import QUANTIZERS, lookup
from . import search
from .spec import QuantizerSpec

HALF = (torch.float16, torch.bfloat16)


def random_mask(x, share):
    """Shaped like `x`, uint8: 1 with probability `share`, else 0."""
    return (torch.rand_like(x) < share).to(torch.uint8)


class Quantizer(nn.Module):
    """Maps a float tensor to its quantize-dequantize value.

    The scale is kept as its logarithm: it stays positive and a learning rate acts
    relative to its size. Off (`enabled=False`) it returns its input untouched; on
    but without scales it raises, so nothing runs in float unnoticed.

    Args:
        spec (QuantizerSpec): kind, bits, granularity.
        size (int): number of scales: 1, channels or heads.
        axis (int | None): axis of the input the scales run along.
    """

    valid_rows = None  # (windows, rows), bool, of attention weights whose windows are padded

    def __init__(self, spec, size=1, axis=None):
        super().__init__()
        self.spec = spec
        self.axis = axis
        self.enabled = False
        self.keep_prob = 1.0  # QDrop: share of values that are quantized while learning
        self.noise = random_mask  # draws which
        self.log_scale = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.register_buffer('zero_point', torch.zeros(size))
        self.calibrated = False

    @property
    def bits(self):
        return self.spec.bits

    @property
    def state_keys(self):
        """Names of the tensors that a checkpoint holds of it."""
        return (*self._parameters, *self._buffers)

    @property
    def scale(self):
        """Scales, shape (size,), positive."""
        return self.log_scale.exp()

    @torch.no_grad()
    def set_scale(self, scale, zero_point=None):
        """Take scales (and zero points) of shape (size,); marks the quantizer calibrated."""
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError('scales must be positive and finite')
        self.log_scale.copy_(scale.log())
        self.zero_point.copy_(torch.zeros_like(scale) if zero_point is None else zero_point)
        self.calibrated = True

    def spread(self, values, x):
        """Shape a (size,) tensor so that it broadcasts against `x`."""
        if self.axis is None:
            return values
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return values.view(shape)

    def by_scale(self, x):
        """The values of `x` that each scale is of: (size, n)."""
        return x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)

    def forward(self, x):
        if not self.enabled:
            return x
        if not self.calibrated:
            raise RuntimeError(f'{self} is on but was never calibrated')
        dtype = x.dtype
        if dtype in HALF:
            x = x.float()  # a code of 8 bits does not survive a division in bfloat16
        keep = self.noise(x, self.keep_prob) if self.keep_prob < 1.0 else None
        return self.fake_quantize(x, keep).to(dtype)

    def fake_quantize(self, x, keep=None):
        """Quantize-dequantize `x` with the current scales, but where `keep` (uint8) is 0."""
        raise NotImplementedError

    def levels(self):
        """All values that it can give, ascending: (size, levels), on the CPU.

        None for a kind that has no such list.
        """
        return None

    def calibrate(self, samples, method, extremes=None):
        """Set the scales by what it does to samples of its own input.

        Args:
            samples (Tensor): (size, n).
            method (str): see `search.search_range`; a logarithmic grid has its own search.
            extremes (tuple[Tensor] | None): least and largest values of all data, (size,),
                where the samples are only a part of it.
        """
        raise NotImplementedError

    def refine(self, inputs, weight, again=False):
        """Search again, from what is set, for the least error of a layer's output.

        Args:
            inputs (Tensor): sampled inputs (n, fan_in), float.
            weight (Tensor): the weight in force (rows, fan_in).
            again (bool): what is set was found so already, for nearly this weight.
        """
        raise NotImplementedError

    def refine_by(self, error, low, high, again=False):
        """Search again, from what is set, for the least of an error.

        Args:
            error (callable): gives the error with the scales that are set, for each: (size,).
            low, high (Tensor): extremes of what the error is of, (size,).
            again (bool): as for `refine`.
        """
        raise NotImplementedError

    def _refine_by(self, error, set_grid, start, coarse, near):
        def cost(*grid):
            set_grid(*grid)
            return error()

        set_grid(*search.least(cost, start, coarse, near))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.calibrated:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys,
                              unexpected_keys, error_msgs):
        """Scales in a checkpoint switch the quantizer on; a float checkpoint leaves it off."""
        if f'{prefix}log_scale' not in state_dict:
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.calibrated = self.enabled = True

    def extra_repr(self):
        return f'{self.spec}, size={self.log_scale.numel()}, axis={self.axis}'


def build_quantizer(spec, size=1, axis=None):
    """Build the quantizer a spec names.

    Example:
        >>> q = build_quantizer(QuantizerSpec(bits=4))
        >>> q.set_scale(torch.tensor([0.1]), torch.tensor([3.]))
    """
    spec = spec if isinstance(spec, QuantizerSpec) else QuantizerSpec(**spec)
    return lookup(QUANTIZERS, spec.kind, 'kind')(spec, size, axis)
