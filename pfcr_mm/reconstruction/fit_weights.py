"""Weights in closed form, layer by layer, as a part of calibration.

Two steps, each independent for each layer: float weights make up for what quantized inputs
lose (`compensate_weights`), and rounding makes up for its own errors (`round_weights`).
"""
from dataclasses import dataclass

import torch

from .. import parallel
from ..models.class_tokens import class_token_counts
from ..modules import QuantLayer, set_quantization
from ..quantizers import least_squares
from .class_tokens import weighted_rows
from .noise import PerImage

MAX_FAN_IN = 4096  # moments of wider layers would take more than memory and time are worth
ROWS_AN_INPUT = 8  # with fewer a fit learns the rows by heart, and fresh ones lose by it


@dataclass
class Moments:
    """Sums over weighted input rows x and their quantized values x^ (n, fan_in), in double.

    Rows about a centre, those of class tokens that have a bias of their own, count in the second
    moments alone.
    """

    rows: int = 0
    weight: float = 0.0
    centred: float = 0.0  # the part of `weight` that rows about a centre have
    mean: torch.Tensor = 0.0
    quantized_mean: torch.Tensor = 0.0
    gram: torch.Tensor = 0.0  # x^ x^T
    cross: torch.Tensor = 0.0  # x x^T, float by quantized; None where it is not wanted

    def add(self, rows, quantized, weights, centred=False):
        """Add rows, each counted `weights` (n,) times; `centred` where they are about a centre."""
        rows, quantized, weights = rows.double(), quantized.double(), weights.double()
        weighted = quantized * weights[:, None]
        self.rows += len(rows)
        found = dict(weight=weights.sum(), gram=weighted.t() @ quantized)
        if centred:
            found['centred'] = weights.sum()
        else:
            found.update(mean=weights @ rows, quantized_mean=weighted.sum(0))
        if self.cross is not None:
            found['cross'] = rows.t() @ weighted
        for name, value in found.items():
            # sums of such numbers are exact in double, and the same in any order
            setattr(self, name, getattr(self, name) + value.float().double())

    def settle(self):
        """End of the stream: means over the rows of all processes."""
        self.rows = parallel.total(self.rows)
        means = ['mean', 'quantized_mean']
        names = [*means, 'gram', *(['cross'] if self.cross is not None else [])]
        for name in ('weight', 'centred', *names):
            value = getattr(self, name)
            setattr(self, name, parallel.total(value.cpu() if torch.is_tensor(value) else value))
        if self.rows:
            for name in names:
                weight = self.weight - self.centred if name in means else self.weight
                setattr(self, name, getattr(self, name) / weight)

    def of(self, layer):
        """(mean, quantized mean, gram, cross) for a layer, on its device.

        About the means where the layer's bias can take care of these, which are zero else;
        `cross` is None where it was not wanted.
        """
        mean, quantized_mean, gram, cross = (
            value if value is None else value.to(layer.weight.device)
            for value in (self.mean, self.quantized_mean, self.gram, self.cross))
        if not _has_bias_a_row(layer):
            return torch.zeros_like(mean), torch.zeros_like(mean), gram, cross
        # what rows of float32 cannot tell from zero counts as noise of the inputs
        floor = 1e-5 * gram.diagonal().mean() * torch.eye(
            len(gram), dtype=gram.dtype, device=gram.device)
        share = 1 - self.centred / self.weight  # of rows that have a mean
        if cross is not None:
            cross = cross - share * torch.outer(mean, quantized_mean) + floor
        return (mean, quantized_mean,
                gram - share * torch.outer(quantized_mean, quantized_mean) + floor, cross)


class MomentObserver(PerImage):
    """Gathers `Moments` of each layer's input; use as `Observer`.

    Args:
        model (nn.Module): a quantized model, its activation quantizers calibrated.
        chains (dict[str, Chain]): of the model; they know of class tokens.
        activations (bool): whether activation quantizers are on meanwhile. Moments are then for
            `round_weights`, which needs no `cross`.
        rows (int): rows a layer gives at most in one call.
        seed (int): seed of the sampling.
    """

    def __init__(self, model, chains, activations, rows=1024, seed=0):
        self.model, self.activations, self.rows = model, activations, rows
        self.prefix = class_token_counts(chains)
        super().__init__(seed)
        self.layers = {}  # layer name -> Moments

    def __enter__(self):
        set_quantization(self.model, False, self.activations)
        self._handles = [
            layer.register_forward_pre_hook(self._see(name))
            for name, layer in self.model.named_modules()
            if isinstance(layer, QuantLayer) and _no_moments(layer) is None
        ]
        return self

    def __exit__(self, error, *_):
        for handle in self._handles:
            handle.remove()
        if error is None:
            for moments in self.layers.values():
                moments.settle()

    def _see(self, name):
        moments = self.layers[name] = Moments(cross=None if self.activations else 0.0)

        def hook(layer, args):
            x = args[0]
            if x.numel() == 0:
                return
            count = self.prefix.get(layer, 0) if x.dim() == 3 else 0
            rows, weights = weighted_rows(layer, x, count, self.generator(name), self.rows)
            quantizer, own = layer.input_quantizer, layer.token_quantizer
            first = len(x) * count if own is not None and own.calibrated else 0
            if first:
                tokens, widths = x[:, :count], layer.channel_widths()
                moments.add(*(own.about_centre(tokens, widths, quantize).flatten(0, 1)
                              for quantize in (torch.clone, own.fake_quantize)),
                            weights[:first], centred=True)
            rows, weights = rows[first:], weights[first:]
            quantized = quantizer.fake_quantize(rows) if quantizer.calibrated else rows
            moments.add(rows, quantized, weights)

        return hook


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
        mean, quantized_mean, gram, cross = moments.of(layer)
        before = layer.weight_rows().double()
        after = least_squares.compensate(before, gram, cross, strength)
        if _has_bias_a_row(layer):
            layer.bias.add_(before @ mean - after @ quantized_mean)
        layer.set_weight_rows(after)
        layer.weight_quantizer.calibrated = False


@torch.no_grad()
def round_weights(model, seen):
    """Move each layer's weights so that rounding errors make up for each other.

    Scales are set anew with them. The bias takes the mean of what is left.

    Args:
        model (nn.Module): quantized model, weight quantizers calibrated.
        seen (MomentObserver): filled by passes with quantized activations.
    """
    for layer, moments in _fitted(model, seen):
        quantizer, rows = layer.weight_quantizer, layer.weight_rows().double().clone()
        _, quantized_mean, gram, _ = moments.of(layer)
        moved, scale = least_squares.feed_back_scaled(
            rows, quantizer.scale, quantizer.zero_point, quantizer.spec, gram)
        quantizer.set_scale(scale, quantizer.zero_point)
        layer.set_weight_rows(moved)
        if _has_bias_a_row(layer):
            after = quantizer.fake_quantize(layer.weight).flatten(1).double()
            layer.bias.add_((rows - after) @ quantized_mean)


def _fitted(model, seen):
    """(layer, moments) of the layers that enough rows reached."""
    left = not_fitted(model, seen)
    return [(layer, seen.layers[name]) for name, layer in model.named_modules()
            if name in seen.layers and name not in left]


def not_fitted(model, seen):
    """Why layers with a weight to quantize are left as they are, by name.

    Args:
        model (nn.Module): quantized model.
        seen (MomentObserver): filled.

    Returns:
        dict[str, str]: such as 'fan-in 12544 above 4096'.
    """
    reasons = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            reason = _no_moments(layer) or _too_few(layer, seen.layers[name].rows)
            if reason is not None:
                reasons[name] = reason
    return reasons


def _no_moments(layer):
    """Why moments of a layer's input are not gathered, or None."""
    matrix = layer.weight_rows()
    if matrix is None:
        return 'no matrix product'
    if matrix.shape[1] > MAX_FAN_IN:
        return f'fan-in {matrix.shape[1]} above {MAX_FAN_IN}'
    return None


def _too_few(layer, rows):
    fan_in = layer.weight_rows().shape[1]
    if rows < ROWS_AN_INPUT * fan_in:
        return f'{rows} rows, fewer than {ROWS_AN_INPUT} x fan-in {fan_in}'
    return None


def _has_bias_a_row(layer):
    """Not so for transposed convolutions, whose taps share one."""
    return layer.bias is not None and len(layer.bias) == len(layer.weight_rows())
