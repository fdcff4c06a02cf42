"""Calibration: first scales and zero points, from activations of training images.

Activation scales come from float activations, weight scales in the end from quantized ones.

Statistics are gathered over every call of a layer (all images, all FPN levels, all
RoIs) before any scale is set; large tensors are sub-sampled. What is sampled depends on
the image and the layer, so several processes with an image each see what one sees.
"""
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .. import parallel
from ..errors import UsageError
from ..modules import QuantLayer, QuantMatmul, quantizers_of, real_rows, set_quantization
from ..quantizers import LogQuantizer, search
from .class_tokens import without_own
from .noise import PerImage
from .products import ProductSample, part_of, refine_products

METHODS = ('minmax', 'percentile', 'mse', 'output')
_VALUES = 2**18  # values of a tensor that a scale search looks at


@dataclass
class Reservoir:
    """A uniform random sample of rows out of a stream of unknown length.

    Every row draws a key; the rows with the smallest keys stay (so all rows seen
    have the same chance; a call offers a quarter of the limit at most). Also keeps
    the extremes of everything seen. The sample of two streams together is what is best
    of their samples, whatever their order.
    """

    limit: int
    rows: torch.Tensor = None
    keys: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    low: torch.Tensor = None
    high: torch.Tensor = None

    def add(self, rows, low, high, generator):
        """Offer rows (n, width); `low` and `high` are extremes per group or scalar.

        `generator` draws the keys.
        """
        low, high = low.detach().float().cpu(), high.detach().float().cpu()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        rows = rows.detach()
        keys = torch.rand(len(rows), generator=generator, dtype=torch.float64)  # none are equal
        room = self.limit - len(self.keys)
        if room > 0:
            first = rows[:room].float().cpu()
            self.rows = first.clone() if self.rows is None else torch.cat([self.rows, first])
            self.keys = torch.cat([self.keys, keys[:room]])
            rows, keys = rows[room:], keys[room:]
        if len(keys) == 0:
            return
        kept = torch.cat([self.keys, keys]).topk(self.limit, largest=False).indices
        # only rows that come in are copied, to where others go: a stream is long
        new = kept[kept >= self.limit] - self.limit
        gone = torch.ones(self.limit, dtype=torch.bool)
        gone[kept[kept < self.limit]] = False
        self.rows[gone] = rows[new.to(rows.device)].float().cpu()
        self.keys[gone] = keys[new]

    def settle(self):
        """End of the stream: the sample of all processes, ordered by its keys."""
        bound = torch.cat(parallel.gather(self.keys)).sort().values[:self.limit][-1:]
        kept = self.keys <= bound if len(bound) else slice(0)
        parts = parallel.gather(None if self.rows is None else (
            self.keys[kept], self.rows[kept], self.low, self.high))
        parts = [part for part in parts if part is not None]
        if parts:
            keys, rows, low, high = zip(*parts)
            self.keys, order = torch.cat(keys).sort()
            self.rows = torch.cat(rows)[order]
            self.low, self.high = torch.stack(low).amin(0), torch.stack(high).amax(0)


class Observer(PerImage):
    """Gathers what calibration needs to know of each layer's and matmul's inputs.

    Use as a context manager around forward passes, and say which image they are of;
    on exit handles are removed and the statistics of all processes are merged.

    Args:
        model (nn.Module): a quantized model; quantizers are switched off.
        rows (int): rows kept a layer.
        seed (int): seed of the sampling.
        activations (bool): whether activation quantizers are on instead.
        products (bool): whether products of operands are sampled, for `method='output'`.
    """

    def __init__(self, model, rows=4096, seed=0, activations=False, products=True):
        self.model = model
        self.samples_products = products and not activations  # else their scales are there
        self.activations = activations
        self.limit = rows
        super().__init__(seed)
        self.layers = {}  # layer name -> Reservoir of input rows (n, fan_in)
        self.operands = {}  # quantizer name -> Reservoir of rows (n, groups)
        self.products = {}  # matmul name -> ProductSample

    def __enter__(self):
        set_quantization(self.model, False, self.activations)
        self._handles = []
        for name, module in self.model.named_modules():
            if isinstance(module, QuantLayer):
                self.layers[name] = Reservoir(self.limit)
                self._handles.append(
                    module.register_forward_pre_hook(self._see_layer(name)))
            elif isinstance(module, QuantMatmul):
                for side in ('left_quantizer', 'right_quantizer'):
                    key = f'{name}.{side}'
                    self.operands[key] = Reservoir(self.limit)
                    self._handles.append(getattr(module, side).register_forward_pre_hook(
                        self._see_operand(key)))
                if self.samples_products:
                    self.products[name] = ProductSample()
                    self._handles.append(
                        module.register_forward_pre_hook(self._see_product(name)))
        return self

    def __exit__(self, error, *_):
        for handle in self._handles:
            handle.remove()
        if error is None:
            for sample in (*self.layers.values(), *self.operands.values(),
                           *self.products.values()):
                sample.settle()

    def _see_layer(self, name):
        reservoir = self.layers[name]

        def hook(layer, args):
            x = without_own(layer, args[0])
            if x.numel() == 0:
                return
            generator = self.generator(name)
            rows = layer.input_rows(x, generator, self.limit // 4)
            if layer.input_quantizer.axis is None:
                low, high = x.amin().view(1), x.amax().view(1)
            else:
                flat = x.movedim(layer.input_axis, -1).flatten(0, -2)
                low, high = flat.amin(0), flat.amax(0)
            reservoir.add(rows, low, high, generator)

        return hook

    def _see_operand(self, name):
        reservoir = self.operands[name]

        def hook(quantizer, args):
            x = args[0]
            if x.numel() == 0:
                return
            grouped = quantizer.by_scale(real_rows(quantizer, x))
            generator = self.generator(name)
            pick = torch.randint(
                grouped.shape[1], (min(self.limit, grouped.shape[1]), ),
                generator=generator).to(x.device)
            rows = grouped[:, pick].t()
            if isinstance(quantizer, LogQuantizer):
                rows = rows[rows.amax(1) > 1e-30]  # masked attention is zero in every head
            reservoir.add(rows, grouped.amin(1), grouped.amax(1), generator)

        return hook

    def _see_product(self, name):
        sample = self.products[name]

        def hook(matmul, args):
            generator = self.generator(f'{name} product')
            key = torch.rand((), generator=generator, dtype=torch.float64).item()
            if key >= sample.bound:
                return
            found = part_of(*args, matmul.left_quantizer.valid_rows, generator)
            if found is not None:
                sample.add(key, *found)

        return hook


@contextmanager
def observe(model, rows=4096, seed=0, activations=False, products=True):
    """`with observe(model) as seen:` run float forward passes, then calibrate from `seen`."""
    with Observer(model, rows, seed, activations, products) as observer, torch.no_grad():
        yield observer


@torch.no_grad()
def calibrate(model, seen, method='output', rounds=2, activations=True):
    """Set the scales of all quantizers of `model` from what an `Observer` saw.

    'output' starts from 'mse' and then, alternating, rescales weights and inputs
    to the least error of each layer's output on the sampled rows, and both operands of each
    matmul to the least error of the product.

    Args:
        model (nn.Module): quantized model.
        seen (Observer): filled by float forward passes.
        method (str): 'minmax', 'percentile', 'mse' or 'output'.
        rounds (int): alternations of 'output'.
        activations (bool): False keeps activation scales that are set already and
            calibrates weights alone.

    Returns:
        list[str]: layers that no data reached; they stay float on their input side.
    """
    if method not in METHODS:
        raise UsageError(f'calibration.method={method!r} is not known; choose one of {METHODS}')
    start = 'mse' if method == 'output' else method
    unreached = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            reservoir = seen.layers[name]
            _start_weight(module, start)
            if reservoir.rows is None:
                unreached.append(name)
                continue
            if activations or not module.input_quantizer.calibrated:
                _start_input(module.input_quantizer, reservoir, start)
            if method == 'output':
                for done in range(rounds):
                    _refine(module, reservoir.rows, activations, again=done > 0)
    if activations:
        unreached += _calibrate_operands(model, seen, start)
        if method == 'output':
            refine_products(model, seen.products, rounds)
    return unreached


def _start_weight(layer, method):
    quantizer = layer.weight_quantizer
    rows = quantizer.by_scale(layer.weight)
    quantizer.set_scale(*search.search_range(rows, quantizer.spec, method))


def _start_input(quantizer, reservoir, method):
    if quantizer.axis is None:
        step = -(-reservoir.rows.numel() // _VALUES)  # whole rows: every column is seen
        samples = reservoir.rows[::step].reshape(1, -1)
    else:
        samples = reservoir.rows.t()
    _start(quantizer, samples, reservoir, method)


def _start(quantizer, samples, reservoir, method):
    """Search from samples (size, n), on the quantizer's device."""
    samples, *extremes = (
        t.to(quantizer.log_scale.device) for t in (samples, reservoir.low, reservoir.high))
    quantizer.calibrate(samples, method, tuple(extremes))


def _refine(layer, rows, activations, again):
    """One round: the weight under the quantized input, the input under the quantized weight."""
    matrix = layer.weight_rows()
    if matrix is None:
        return
    quantizer, inputs = layer.weight_quantizer, layer.input_quantizer
    rows = rows.to(matrix)
    quantized = inputs.fake_quantize(rows)
    quantizer.set_scale(*search.refine_weight(
        matrix, quantizer.scale, quantizer.zero_point, quantizer.spec, quantized,
        quantizer.log_scale.numel()))
    if activations and inputs.axis is None:
        weight = quantizer.decode(quantizer.encode(layer.weight))
        kept = layer.weight.data
        layer.weight.data = weight
        matrix = layer.weight_rows()
        layer.weight.data = kept
        inputs.refine(rows[:1024], matrix, again)


def _calibrate_operands(model, seen, method):
    unreached = []
    for name, quantizer in quantizers_of(model):
        if name not in seen.operands:
            continue
        reservoir = seen.operands[name]
        if reservoir.rows is None or len(reservoir.rows) == 0:
            unreached.append(name)
            continue
        _start(quantizer, reservoir.rows.t(), reservoir, method)
    return unreached
