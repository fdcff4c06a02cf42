"""Weights in closed form, layer by layer, as a part of calibration.

Two steps, each independent for each layer: float weights make up for what quantized inputs
lose (`compensate_weights`), and rounding makes up for its own errors (`round_weights`).
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .. import parallel
from ..modules import QuantLayer, set_quantization
from ..quantizers import least_squares
from .noise import seed_of

MAX_FAN_IN = 4096  # moments of wider layers would take more than memory and time are worth
PREFIX_SHARE = 0.1  # of class tokens in a layer's moments, whatever the number of patches


@dataclass
class Moments:
    """Sums over weighted input rows x and their quantized values x^ (n, fan_in), in double."""

    weight: float = 0.0
    mean: torch.Tensor = 0.0
    quantized_mean: torch.Tensor = 0.0
    gram: torch.Tensor = 0.0  # x^ x^T
    cross: torch.Tensor = 0.0  # x x^T, float by quantized

    def add(self, rows, quantized, weights):
        """Add rows, each counted `weights` (n,) times."""
        weighted = quantized * weights[:, None]
        self.weight += weights.sum().double()
        self.mean = self.mean + (weights @ rows).double()
        self.quantized_mean = self.quantized_mean + weighted.sum(0).double()
        self.gram = self.gram + (weighted.t() @ quantized).double()
        self.cross = self.cross + (rows.t() @ weighted).double()

    def settle(self):
        """End of the stream: means over the rows of all processes."""
        for name in ('weight', 'mean', 'quantized_mean', 'gram', 'cross'):
            value = parallel.total(getattr(self, name))
            if torch.is_tensor(value):  # sums in another order are the same then, but for one
                value = value.float().double()  # in millions
            setattr(self, name, value)
        if self.weight > 0:
            for name in ('mean', 'quantized_mean', 'gram', 'cross'):
                setattr(self, name, getattr(self, name) / self.weight)

    def centred(self):
        """(gram, cross) about the means: what is left where a bias takes care of these."""
        return (self.gram - torch.outer(self.quantized_mean, self.quantized_mean),
                self.cross - torch.outer(self.mean, self.quantized_mean))


class MomentObserver:
    """Gathers `Moments` of each layer's input; use as `Observer`.

    Args:
        model (nn.Module): a quantized model, its activation quantizers calibrated.
        chains (dict[str, Chain]): of the model; they know of class tokens.
        activations (bool): whether activation quantizers are on meanwhile.
        rows (int): rows a layer gives at most in one call.
        seed (int): seed of the sampling.
    """

    def __init__(self, model, chains, activations, rows, seed):
        self.model, self.activations, self.rows, self.seed = model, activations, rows, seed
        self.prefix = {module: chain.prefix_tokens for chain in chains.values()
                       for leaf in chain.leaves for root in leaf.modules
                       for module in root.modules()}
        self.begin_image(0)
        self.layers = {}  # layer name -> Moments

    def begin_image(self, number):
        """The passes that follow are of the image with this number."""
        self._image = number

    def __enter__(self):
        set_quantization(self.model, False, self.activations)
        self._handles = [
            layer.register_forward_pre_hook(self._see(name))
            for name, layer in self.model.named_modules()
            if isinstance(layer, QuantLayer) and layer.weight_rows() is not None
            and layer.weight_rows().shape[1] <= MAX_FAN_IN
        ]
        return self

    def __exit__(self, error, *_):
        for handle in self._handles:
            handle.remove()
        if error is None:
            for moments in self.layers.values():
                moments.settle()

    def _see(self, name):
        moments = self.layers[name] = Moments()

        def hook(layer, args):
            x = args[0]
            if x.numel() == 0:
                return
            rows, weights = self._sample(layer, name, x)
            quantizer = layer.input_quantizer
            quantized = quantizer.fake_quantize(rows) if quantizer.calibrated else rows
            moments.add(rows, quantized, weights)

        return hook

    def _sample(self, layer, name, x):
        """Rows of an input, and their weights."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, name, self._image))
        count = self.prefix.get(layer, 0) if x.dim() == 3 else 0
        rows = layer.input_rows(x[:, count:] if count else x, generator, self.rows)
        weights = torch.ones_like(rows[:, 0])
        if count:
            first = x[:, :count].flatten(0, 1)
            weight = PREFIX_SHARE / (1 - PREFIX_SHARE) * len(rows) / len(first)
            rows = torch.cat([first, rows])
            weights = torch.cat([torch.full_like(first[:, 0], weight), weights])
        return rows, weights


@contextmanager
def observe_moments(model, chains, activations, rows=1024, seed=0):
    """`with observe_moments(...) as seen:` run forward passes, then fit weights from `seen`."""
    with MomentObserver(model, chains, activations, rows, seed) as observer, torch.no_grad():
        yield observer


@torch.no_grad()
def compensate_weights(model, seen, strength):
    """Let each layer's weight and bias make up for its quantized input.

    Scales of the weights that change are marked invalid.

    Args:
        model (nn.Module): quantized model.
        seen (MomentObserver): filled by float passes.
        strength (float): of the ridge, see `least_squares.compensate`.
    """
    for layer, moments in _fitted(model, seen):
        centred = _has_bias_a_row(layer)
        gram, cross = moments.centred() if centred else (moments.gram, moments.cross)
        before = layer.weight_rows().double()
        after = least_squares.compensate(before, gram, cross, strength)
        if centred:
            layer.bias.add_(before @ moments.mean - after @ moments.quantized_mean)
        layer.set_weight_rows(after)
        layer.weight_quantizer.calibrated = False


@torch.no_grad()
def round_weights(model, seen):
    """Move each layer's weights so that rounding errors make up for each other.

    The bias takes the mean of what is left.

    Args:
        model (nn.Module): quantized model, weight quantizers calibrated.
        seen (MomentObserver): filled by passes with quantized activations.
    """
    for layer, moments in _fitted(model, seen):
        quantizer, rows = layer.weight_quantizer, layer.weight_rows().double()
        repeat = len(rows) // quantizer.log_scale.numel()
        scale, zero_point = (value.repeat_interleave(repeat)
                             for value in (quantizer.scale, quantizer.zero_point))
        centred = _has_bias_a_row(layer)
        gram = moments.centred()[0] if centred else moments.gram
        layer.set_weight_rows(least_squares.feed_back(
            rows, scale, zero_point, quantizer.spec, gram))
        if centred:
            after = quantizer.fake_quantize(layer.weight).flatten(1).double()
            layer.bias.add_((rows - after) @ moments.quantized_mean)


def _fitted(model, seen):
    """(layer, moments) of the layers that data reached."""
    return [(layer, seen.layers[name]) for name, layer in model.named_modules()
            if name in seen.layers and seen.layers[name].weight > 0]


def _has_bias_a_row(layer):
    """Not so for transposed convolutions, whose taps share one."""
    return layer.bias is not None and len(layer.bias) == len(layer.weight_rows())
