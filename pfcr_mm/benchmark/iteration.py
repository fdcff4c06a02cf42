"""What an iteration costs: as PFCR does it, as published code does, and in plain float."""
import copy

import torch

from ..modules import QuantLayer
from ..reconstruction import UnitConfig
from ..reconstruction.build_loss import build_loss
from ..reconstruction.feed import collate
from ..reconstruction.optimize import reconstruct, unit_modules
from ..reconstruction.precision import Precision
from .reference import straight_twin
from .timing import Stopwatch

HELD_OUT = 4
# Iterations in a row on a GPU, which loads the next batch meanwhile: a float step between each two
# would hide it.
ROW = 10


def measure_iteration(case, clock='wall', pairs=15, straight=False, **options):
    """Iterations of `reconstruct` in turn with forward + backward of the float unit.

    Args:
        case (Case): see `build_case`; it is left as it was.
        clock (str): see `Stopwatch`.
        pairs (int): of measurements.
        straight (bool): reconstruct as published code does, see `reference`.
        options: of UnitConfig, such as keep_prob.

    Returns:
        Stopwatch: 'iteration' and 'float' in turn; on a GPU means of ROW in a row.
    """
    device = next(case.model.parameters()).device
    watch = Stopwatch(clock, device)
    model = straight_twin(case.model) if straight else copy.deepcopy(case.model)
    chain = case.chain_of(model)
    row = 1 if device.type == 'cpu' else ROW
    config = UnitConfig(iters=(pairs + 3) * row + 1, batch_size=case.batch, **options)
    plain = float_step(case, config)
    began = None

    def on_step(step, loss):
        nonlocal began
        if step % row:
            return
        if began is not None:
            watch.note('iteration', (watch.read() - began) / row)
            began = watch.read()
            for _ in range(row):
                plain()
            watch.note('float', (watch.read() - began) / row)
        began = watch.read()

    reconstruct(chain, case.unit, case.inputs, case.inputs, case.targets, config, 'rounding',
                HELD_OUT, torch.Generator().manual_seed(0), device, on_step)
    return watch


def float_step(case, config):
    """A function: forward and backward of the float unit, gradients of all weights and biases.

    The batch is on the device already; there is no optimiser.
    """
    device = next(case.model.parameters()).device
    indices = list(range(case.batch))
    state = case.inputs.batch(indices, device)
    target = collate((case.targets[i] for i in indices), device)
    loss_of = build_loss(config.loss, case.targets, case.float_chain.channel_axis)
    precision = Precision(config.autocast, device)
    parameters = float_parameters(case)

    def step():
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        loss = loss_of(precision.run(case.float_chain, case.unit, state), target)
        precision.scaler.scale(loss).backward()
        for parameter in parameters:
            parameter.requires_grad_(False)

    return step


def float_parameters(case):
    """Weights and biases of the float unit that belong to quantized layers."""
    found = []
    for quantized, floating in zip(unit_modules(case.chain, case.unit),
                                   unit_modules(case.float_chain, case.unit)):
        for name, layer in quantized.named_modules():
            if isinstance(layer, QuantLayer):
                twin = floating.get_submodule(name)
                found += [p for p in (twin.weight, twin.bias) if p is not None]
    return found
