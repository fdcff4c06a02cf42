"""What a unit learns: weights or their rounding, scales, biases, norms, and their optimiser."""
import math
from contextlib import contextmanager

import torch

from .. import parallel
from ..modules import QuantLayer, quantizers_of, weights_once
from ..quantizers import fused_kernels, random_mask
from .graphs import StepGraphs
from .precision import Precision


def step_share(bits):
    """Step of a weight's grid as a share of that of 4 bits, at most 1.

    A rate that turns the roundings of 4-bit weights moves those of 8 bits a step an iteration.
    """
    return min(1.0, 15 / (2**bits - 1))


class LearnedParameters:
    """The parameters a unit learns, with their optimiser, as a context manager.

    On entry roundings are opened and gradients enabled, on exit all is closed again.
    """

    graphs = None  # of steps on a GPU, see `StepGraphs`
    not_recorded = None  # why there are none where the config asks for them, in words

    def __init__(self, modules, config, learn_weights):
        self.modules = modules
        self.config = config
        self.learn_weights = learn_weights
        self.open = []  # layers with an open rounding

    def __enter__(self):
        config, groups = self.config, {}

        def add(parameter, lr, decays=True):
            if lr > 0 and parameter is not None:
                groups.setdefault((lr, decays), []).append(parameter)

        self.clipped = []
        roots = () if self.learn_weights == 'fixed' else self.modules
        for layer in (m for root in roots for m in root.modules()):
            if isinstance(layer, QuantLayer):
                if self.learn_weights == 'float' or layer.rounding.learns_weight:
                    add(layer.weight, config.weight_lr * step_share(layer.weight_quantizer.bits))
                    self.clipped.append(layer.weight)
                if self.learn_weights != 'float' and layer.weight_quantizer.enabled:
                    own = (layer.rounding.open(layer.weight, layer.weight_quantizer)
                           if config.rounding_lr > 0 else [])
                    if own:
                        self.open.append(layer)
                    for parameter in own:
                        add(parameter, config.rounding_lr, decays=False)
                    if not own and not layer.rounding.of_one_scale:
                        add(layer.weight_quantizer.log_scale, config.weight_scale_lr)
                add(layer.bias, config.bias_lr)
                if layer.token_quantizer is not None and layer.token_quantizer.enabled:
                    add(layer.token_quantizer.bias, config.bias_lr)
            elif isinstance(layer, torch.nn.LayerNorm):
                add(layer.weight, config.norm_lr)
                add(layer.bias, config.norm_lr)
        self.activations = []
        for root in self.modules:
            for name, quantizer in quantizers_of(root):
                if name.rpartition('.')[2] != 'weight_quantizer' and quantizer.enabled:
                    add(quantizer.log_scale, config.scale_lr)
                    self.activations.append(quantizer)
        for quantizer in self.activations:
            quantizer.keep_prob = config.keep_prob
        self.parameters = [p for group in groups.values() for p in group]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        if self.parameters:
            self.precision = Precision(config.autocast, self.parameters[0].device)
            self.optimizer = torch.optim.Adam(
                [dict(params=params, lr=lr, base_lr=lr, decays=decays)
                 for (lr, decays), params in groups.items()],
                fused=all(p.device.type in ('cpu', 'cuda') for p in self.parameters))
        return self

    def set_progress(self, progress):
        """Cosine decay to zero of all rates but AdaRound's."""
        factor = 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            if group['decays']:
                group['lr'] = group['base_lr'] * factor

    def backward(self, chain, unit, batch, loss_of, progress, limit):
        """This process's part of the gradient of one step, `limit` images at a time.

        `batch` is None where it holds none of the batch's images.

        Returns:
            GradientSum: its part; those of all processes are to be settled.
        """
        found = parallel.GradientSum(self.parameters, self.precision.scaler.scale)
        if parallel.is_main():  # once a step, over all parts and processes
            extra = sum(layer.rounding.regularisation(progress) for layer in self.open)
            if torch.is_tensor(extra):
                self.precision.scaler.scale(extra).backward()
        for quantizer in self.activations if batch else ():
            quantizer.noise = batch.noise

        def loss_at(state, target, share):
            return loss_of(self.precision.run(chain, unit, state), target) * share

        if batch and self.config.cuda_graphs:
            self.not_recorded = self._obstacle_to_graphs(batch, limit)
            if self.not_recorded is None:
                if self.graphs is None:
                    self.graphs = StepGraphs(lambda *given: self._alone(loss_at, *given),
                                             self.parameters)
                found.loss += self.graphs(batch.state, batch.target)
                self.not_recorded = self.graphs.obstacle
                return found
            self.graphs = None  # and their memory
        for state, target, share in batch.parts(limit) if batch else ():
            with weights_once(self.modules), fused_kernels(self.config.compile):
                found.backward(loss_at(state, target, share))
        return found

    def _obstacle_to_graphs(self, batch, limit):
        """Why a step is not the same operations for every batch, all of them here; or None."""
        config = self.config
        return next((told for told, holds in (
            ('there is no GPU', self.precision.device.type != 'cuda'),
            ('there are several processes', parallel.world_size() > 1),
            ('keep_prob below 1 draws anew in each step', config.keep_prob < 1),
            ("AdaRound's regulariser changes from step to step", self.open),
            ("autocast='float16' may leave steps out", config.autocast == 'float16'),
            ('compile=True makes other kernels', config.compile),
            ('batches do not fit as a whole', len(batch.numbers) > limit)) if holds), None)

    def _alone(self, loss_at, state, target):
        with weights_once(self.modules):
            loss = loss_at(state, target, 1.0)
            loss.backward()
        return loss.detach()

    def update(self):
        """One step of the optimiser along the gradient."""
        if all(p.grad is None for p in self.parameters):  # the scaler wants one at least
            return
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        if self.config.clip_grad > 0 and self.clipped:
            torch.nn.utils.clip_grad_norm_(self.clipped, self.config.clip_grad)
        scaler.step(self.optimizer)
        scaler.update()

    @contextmanager
    def paused(self):
        """The unit as it is if learning ends here."""
        for quantizer in self.activations:
            quantizer.keep_prob = 1.0
        for layer in self.open:
            layer.rounding.is_open = False
        yield
        for quantizer in self.activations:
            quantizer.keep_prob = self.config.keep_prob
        for layer in self.open:
            layer.rounding.is_open = True

    def __exit__(self, *_):
        self.graphs = None  # and their memory
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for quantizer in self.activations:
            quantizer.keep_prob, quantizer.noise = 1.0, random_mask
        for layer in self.open:
            layer.rounding.close()
