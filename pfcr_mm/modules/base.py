"""`QuantLayer`: what every layer with a quantized weight and input shares."""
import copy
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import UsageError
from ..quantizers import Quantizer, QuantizerSpec, build_quantizer, build_rounding
from ..quantizers.packing import pack_codes, unpack_codes


class QuantLayer:
    """Mixin over an `nn.Module` with `weight` and `bias`.

    A subclass is also a subclass of the float layer, shares its Parameters and
    keeps their names, so float checkpoints load and `isinstance` still answers.
    The weight has one scale an output channel, the input one scale a tensor.
    """

    weight_axis = 0  # axis of the output channels
    input_axis = -1  # axis of the input channels
    kept_weight = None  # within `weights_once` a list, of the quantized weight once it is made

    @classmethod
    def from_float(cls, module, weight_bits, activation_bits, rounding='latent',
                   weight_symmetric=False, activation_symmetric=False):
        """Make the quantized twin of a float layer; quantizers start off.

        Args:
            module (nn.Module): the float layer.
            weight_bits, activation_bits (int): 2 to 8.
            rounding (str | dict): weight rounding, see `build_rounding`.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        # Parameters, buffers, sizes, strides and hooks as the float layer has them.
        layer.__dict__.update({
            key: (value.copy() if isinstance(value, dict) else value)
            for key, value in module.__dict__.items()
        })
        layer.weight_quantizer = build_quantizer(
            QuantizerSpec(bits=weight_bits, symmetric=weight_symmetric, granularity='channel'),
            module.weight.shape[cls.weight_axis], cls.weight_axis)
        layer.input_quantizer = build_quantizer(
            QuantizerSpec(bits=activation_bits, symmetric=activation_symmetric))
        layer.token_quantizer = None
        layer.rounding_cfg = rounding
        layer.rounding = build_rounding(rounding)
        layer.hardened = False
        return layer

    def quantized_weight(self):
        """The weight that the forward pass uses."""
        if self.hardened:
            return self.weight
        if self.kept_weight:
            return self.kept_weight[0]
        weight = self.rounding(self.weight, self.weight_quantizer)
        if self.kept_weight is not None:
            self.kept_weight.append(weight)
        return weight

    @torch.no_grad()
    def harden(self):
        """Fix the rounding: the weight becomes decode(integer codes). Idempotent.

        Returns:
            Tensor: the integer codes as floats, shaped like the weight.
        """
        codes = self.rounding.harden(self.weight, self.weight_quantizer)
        self.set_codes(codes)
        return codes

    @torch.no_grad()
    def set_codes(self, codes):
        """Take integer codes as the final weight."""
        self.weight.copy_(self.weight_quantizer.decode(codes))
        self.rounding = build_rounding('nearest')
        self.hardened = True

    @torch.no_grad()
    def packed_weight(self):
        """The final weight's codes, packed at their bit width (uint8)."""
        low = self.weight_quantizer.code_range[0]
        codes = self.weight_quantizer.encode(self.weight) - low
        return pack_codes(codes.cpu(), self.weight_quantizer.bits)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys,
                              unexpected_keys, error_msgs):
        """Also takes `weight_packed`, so that any loader reads a quantized checkpoint."""
        packed = state_dict.get(f'{prefix}weight_packed')
        if packed is not None:
            state_dict = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
            del state_dict[f'{prefix}weight_packed']
            state_dict[f'{prefix}weight'] = self._unpack(packed, state_dict, prefix)
            self.rounding = build_rounding('nearest')
            self.hardened = True
        elif f'{prefix}weight' in state_dict:
            self.hardened = False
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _unpack(self, packed, state_dict, prefix):
        quantizer = copy.deepcopy(self.weight_quantizer)
        quantizer.load_state_dict({
            key: state_dict[f'{prefix}weight_quantizer.{key}']
            for key in ('log_scale', 'zero_point')
        })
        try:
            codes = unpack_codes(packed.cpu(), quantizer.bits, self.weight.shape)
        except ValueError as error:
            raise UsageError(
                f'{prefix}weight_packed does not fit the config, which says '
                f'{quantizer.bits} bits and shape {tuple(self.weight.shape)}: {error}') from None
        codes = codes.to(quantizer.log_scale) + quantizer.code_range[0]
        return quantizer.decode(codes)

    def weight_rows(self):
        """The weight as a matrix (rows, fan_in) that multiplies `input_rows`.

        Returns None where the layer is no plain matrix product (grouped convolutions).
        """
        raise NotImplementedError

    def set_weight_rows(self, rows):
        """Take a matrix as `weight_rows` gives it for the weight."""
        self.weight.copy_(rows.reshape(self.weight.shape))

    def input_rows(self, x, generator, limit):
        """A random sample of the input as rows (n <= limit, fan_in), n over all positions."""
        raise NotImplementedError


@contextmanager
def weights_once(modules):
    """Quantize each weight below `modules` once within the block, not once a call.

    Weights and scales must not change within it, and what is made with gradients on has
    them: a graph through it can be walked back once.
    """
    layers = [m for root in modules for m in root.modules() if isinstance(m, QuantLayer)]
    for layer in layers:
        layer.kept_weight = []
    try:
        yield
    finally:
        for layer in layers:
            layer.kept_weight = None


def quantizers_of(module):
    """Yield (name, quantizer) of all quantizers below `module`."""
    for name, child in module.named_modules():
        if isinstance(child, Quantizer):
            yield name, child


def set_quantization(module, weight, activation):
    """Switch the weight and the activation quantizers below `module` on or off.

    Quantizers without scales (no calibration data reached them) stay off.
    """
    for name, quantizer in quantizers_of(module):
        on = weight if name.rpartition('.')[2] == 'weight_quantizer' else activation
        quantizer.enabled = bool(on and quantizer.calibrated)


def random_rows(rows, generator, limit):
    """At most `limit` rows of a matrix, chosen at random without replacement."""
    if rows.shape[0] <= limit:
        return rows
    pick = torch.randperm(rows.shape[0], generator=generator)[:limit]
    return rows[pick.to(rows.device)]
