"""Reconstruct one unit: make its quantized output match its float output."""
import itertools
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import torch

from .. import parallel
from ..errors import UsageError, check_keys
from ..modules import QuantLayer, quantizers_of, weights_once
from ..quantizers import fused_kernels, random_mask
from ..quantizers.blocks import mixed
from .build_loss import build_loss, check_loss, check_shareable
from .capture import collate, looking_ahead, split
from .early_stop import EarlyStop, Plateau
from .faults import ALL_FINITE, BatchLimit, Faults, NotFinite, find_nonfinite, split_batch
from .noise import ImageNoise
from .precision import Precision, check_autocast


@dataclass
class UnitConfig:
    """How units of one level are optimised.

    Args:
        iters (int): optimisation steps.
        batch_size (int): images a step.
        weight_lr (float): Adam rate of latent weights of up to 4 bits; those of more bits have
            it in proportion to their step.
        adaround_lr (float | None): Adam rate of AdaRound variables, which does not decay: they are
            to come to a decision. None is 20 / iters: 1e-3 for the 20,000 iterations of published
            runs, and in shorter ones the same way to go, but 0.1 at most, beyond which they
            overshoot.
        scale_lr (float): rate of activation scales, relative to the scale.
        weight_scale_lr (float): rate of weight scales, relative; 0 keeps them.
        bias_lr (float): rate of biases.
        norm_lr (float): rate of LayerNorm weights and biases; 0 keeps them.
        input_mix (float): share of input elements from the quantized prefix, in steps of
            1/256; the rest is float (QDrop). 1 is the pure quantized prefix, 0 the float one.
        keep_prob (float): share of activations quantized inside the unit (QDrop), as finely.
        loss (str | dict): a name of the RECONSTRUCTION_LOSSES table, or dict(type=name, ...).
        clip_grad (float): bound on the gradient norm of the weights; 0 is none.
        early_stop (dict | None): `EarlyStop` fields: fewer steps where the held-out loss no
            longer falls. Rates decay as for all `iters`. None is never.
        autocast (str | None): 'bfloat16' or 'float16': steps run under torch.autocast, with
            quantizers, losses and the optimiser in float32, as held-out losses always are.
        compile (bool): quantizers of the steps as kernels fused by torch.compile.
    """

    iters: int = 200
    batch_size: int = 8
    weight_lr: float = 5e-4
    adaround_lr: float | None = None
    scale_lr: float = 5e-3
    weight_scale_lr: float = 1e-3
    bias_lr: float = 5e-4
    norm_lr: float = 0.0
    input_mix: float = 1.0
    keep_prob: float = 1.0
    loss: object = 'channel_mse'
    clip_grad: float = 0.0
    early_stop: object = None
    autocast: object = None
    compile: bool = False

    def __post_init__(self):
        for name, least in (('iters', 1), ('batch_size', 1)):
            value = getattr(self, name)
            if not _is_number(value) or not isinstance(value, int) or value < least:
                raise UsageError(f'{name}={value!r} is not an integer of {least} or more')
        for name in ('weight_lr', 'adaround_lr', 'scale_lr', 'weight_scale_lr', 'bias_lr',
                     'norm_lr', 'clip_grad'):
            value = getattr(self, name)
            if value is None and name == 'adaround_lr':
                continue
            if not _is_number(value) or value < 0:
                raise UsageError(f'{name}={value!r} is not a number of 0 or more')
        if not 0 <= self.input_mix <= 1:
            raise UsageError(f'input_mix={self.input_mix!r} is not from 0 to 1')
        if not 0 < self.keep_prob <= 1:
            raise UsageError(f'keep_prob={self.keep_prob!r} is not above 0 and at most 1')
        EarlyStop.build(self.early_stop)
        check_autocast(self.autocast)
        if not isinstance(self.compile, bool):
            raise UsageError(f'compile={self.compile!r} is neither True nor False')

    @property
    def rounding_lr(self):
        """`adaround_lr` in force."""
        return min(20 / self.iters, 0.1) if self.adaround_lr is None else self.adaround_lr

    @classmethod
    def build(cls, base, level, key='reconstruction', more=None):
        """From a base dict and the per-level overrides in base['per_level'].

        `more` is another such dict, laid over it.
        """
        merged = {}
        for layer in (base, more or {}):
            merged.update({k: v for k, v in layer.items() if k != 'per_level'})
            merged.update(layer.get('per_level', {}).get(level, {}))
        check_keys(merged, [f.name for f in fields(cls)], key)
        check_loss(merged.get('loss', cls.loss), f'{key}.loss')
        return cls(**merged)


def _is_number(value):
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value))


@dataclass
class UnitRecord:
    """What came of one unit; a line of `report.json`."""

    name: str
    chain: str
    level: str
    pos_stage: int
    loss_before: float
    loss_after: float
    accepted: bool
    iters: int
    seconds: float
    peak_memory_mb: float = 0.0


def reconstruct(chain, unit, quantized_inputs, float_inputs, targets, config, learn_weights,
                held_out, generator, device, on_step=None, faults=None, loss_of=None,
                at_once=None):
    """Learn rounding, scales and biases of a unit; undo it where the held-out loss rose.

    Of several processes all draw the same batches, and each computes the part of it that
    it holds the images of; gradients and losses are summed.

    Args:
        chain (Chain): of the quantized model.
        unit (Unit): leaves [start, stop) of the chain.
        quantized_inputs (Stream): the unit's input from the quantized prefix.
        float_inputs (Stream): the same from the float model.
        targets (Targets): the float model's outputs, one entry an image held.
        config (UnitConfig): rates and iterations.
        learn_weights (str): 'rounding' as the layers' rounding says, or 'float' for
            plain float weights (first stage of POS), or 'fixed' for activation scales alone.
        held_out (int): images kept for accepting.
        generator (torch.Generator): draws batches, alike in all processes; its seed also
            draws QDrop's masks.
        device (torch.device): where to compute.
        on_step (callable | None): called with (step, loss).
        faults (Faults | None): what to do where memory runs out or a loss is no number.
        loss_of (callable | None): the loss where it is built already, else config.loss.
        at_once (int | None): images computed together at most, whatever the batch; with 1 all
            is the same to the bit for any number of processes.

    Returns:
        dict: loss_before, loss_after (what learning reached, also where it was undone),
        accepted, iters (steps taken), seconds.

    Raises:
        FaultError: no memory even for one image; or NaN or Inf, and `faults` says stop.
    """
    began = time.time()
    faults = faults or Faults()
    limit = BatchLimit(config.batch_size, unit.name, faults.tell, at_once)
    roll = quantized_inputs.roll_call()
    learn_on, accept_on = split(roll.rows, held_out)
    held = quantized_inputs.held
    loss_of = loss_of or build_loss(config.loss, targets, chain.channel_axis)
    check_shareable(loss_of, config.loss)
    modules = unit_modules(chain, unit)

    def evaluate():
        with weights_once(modules):
            own = limit.run(lambda size: _held_out_loss(
                chain, unit, quantized_inputs, targets, held(accept_on), loss_of, size, device))
        found = itertools.chain(*parallel.gather(own))
        return math.fsum(found) / max(1, roll.rows_of(accept_on))

    def look():
        with learned.paused():
            return evaluate()

    def check(loss, what, mine, autocast=None):
        if not math.isfinite(loss):
            found = parallel.gather(find_nonfinite(
                chain, unit, quantized_inputs.batch(mine, device),
                collate((targets[i] for i in mine), device), faults.name_of)
                if mine else ALL_FINITE)
            cause = min(found, key=ALL_FINITE.__eq__)
            if autocast and cause == ALL_FINITE:
                cause += f' in float32: autocast={autocast!r} overflows'
            raise NotFinite(loss, what, unit, cause)

    before = after = evaluate()
    saved = snapshot(modules)
    learned = LearnedParameters(modules, config, learn_weights)
    noise = ImageNoise(generator.initial_seed())
    buckets = [[i for i in bucket if i in set(learn_on)] for bucket in roll.buckets]
    buckets = [b for b in buckets if b]
    sources = [targets]  # that a step reads, see Batch.collect
    if config.input_mix > 0:
        sources.append(quantized_inputs)
    if config.input_mix < 1:
        sources.append(float_inputs)
    plateau, steps = Plateau(EarlyStop.build(config.early_stop)), 0
    every = 1 if device.type == 'cpu' else 10  # looking at a loss makes a GPU wait
    try:
        check(before, 'loss before learning', held(accept_on)[:1])
        with _undone_on_error(modules, saved), learned:
            picks = looking_ahead(_picks(
                buckets, config.batch_size, config.iters if learned.parameters else 0, generator))
            for step, (pick, following) in enumerate(picks):
                progress = step / config.iters
                learned.set_progress(progress)
                mine = held(pick)
                for source in sources if following else ():
                    source.ahead(held(following))
                batch = None
                if mine:
                    batch = Batch.collect(
                        quantized_inputs, float_inputs, targets, mine, step, noise, device,
                        config.input_mix, roll.rows_of(pick))
                loss = limit.run(partial(
                    learned.backward, chain, unit, batch, loss_of, progress)).settle()
                if step % every == 0:
                    check(loss.item(), f'loss of step {step}', mine, config.autocast)
                learned.update()
                if step % every == 0 and learned.precision.overflows():
                    raise NotFinite(math.inf, f'gradient of step {step}', unit,
                                    'no loss scale of float16 is small enough for it')
                steps = step + 1
                if on_step is not None:
                    on_step(step, loss)
                if plateau.reached(steps, look):
                    break
            if steps:
                learned.precision.overflows()  # counts what came after the last look
                faults.left_out(unit, learned.precision.left_out, steps)
        parallel.copy_from_main([p for m in modules for p in m.parameters()])  # to the bit
        after = evaluate()
        with _undone_on_error(modules, saved):
            check(after, 'loss after learning', held(accept_on)[:1])
        accepted = after < before
        if not accepted:
            restore(modules, saved)
    except NotFinite as found:
        accepted, after = False, found.loss
        faults.nonfinite(found)
    return dict(
        loss_before=before, loss_after=after, accepted=accepted, iters=steps,
        seconds=time.time() - began)


def _picks(buckets, size, count, generator):
    """Yield images of `count` batches, each of one bucket, drawn by their sizes."""
    weights = torch.tensor([float(len(b)) for b in buckets])
    for _ in range(count):
        bucket = buckets[torch.multinomial(weights, 1, generator=generator).item()]
        order = torch.randperm(len(bucket), generator=generator)[:size]
        yield [bucket[i] for i in order.tolist()]


@dataclass
class Batch:
    """What this process holds of a step's batch.

    Args:
        state (State): input of the unit.
        target (tuple[Tensor]): what its output should be.
        numbers (list[int]): of the images.
        sizes (list[int]): rows of each.
        rows (int): of the whole batch, over all processes.
        step (int): of the optimisation.
        noise (ImageNoise): draws what is quantized (QDrop).
    """

    state: object
    target: tuple
    numbers: list
    sizes: list
    rows: int
    step: int
    noise: ImageNoise

    @classmethod
    def collect(cls, quantized, floating, targets, indices, step, noise, device, input_mix, rows):
        """From streams and targets; `rows` has the whole batch."""
        numbers = [quantized.numbers[i] for i in indices]
        sizes = [quantized.states[i].rows for i in indices]
        state = (quantized if input_mix > 0 else floating).batch(indices, device)
        if 0 < input_mix < 1:
            noise.begin('input', step, numbers, sizes)
            state = _mix(state, floating.batch(indices, device), input_mix, noise)
        target = collate((targets[i] for i in indices), device)
        return cls(state, target, numbers, sizes, rows, step, noise)

    def parts(self, limit):
        """Parts of at most `limit` images: state, target and share of the whole batch."""
        for state, target, rows, some in split_batch(
                self.state, self.target, self.sizes, limit):
            self.noise.begin('inside', self.step, self.numbers[some], self.sizes[some])
            yield state, target, rows / self.rows


@contextmanager
def _undone_on_error(modules, saved):
    """Restore the unit where its optimisation is cut off: the model is whole between units."""
    try:
        yield
    except BaseException:
        restore(modules, saved)
        raise


def step_share(bits):
    """Step of a weight's grid as a share of that of 4 bits, at most 1.

    A rate that turns the roundings of 4-bit weights moves those of 8 bits a step an iteration.
    """
    return min(1.0, 15 / (2**bits - 1))


class LearnedParameters:
    """The parameters a unit learns, with their optimiser, as a context manager.

    On entry roundings are opened and gradients enabled, on exit all is closed again.
    """

    def __init__(self, modules, config, learn_weights):
        self.modules = modules
        self.config = config
        self.learn_weights = learn_weights
        self.open = []  # layers with an open rounding

    def __enter__(self):
        config, groups = self.config, {}

        def add(parameter, lr, decays=True):
            if lr > 0:
                groups.setdefault((lr, decays), []).append(parameter)

        self.clipped = []
        roots = () if self.learn_weights == 'fixed' else self.modules
        for layer in (m for root in roots for m in root.modules()):
            if isinstance(layer, QuantLayer):
                if self.learn_weights == 'float' or layer.rounding.learns_weight:
                    add(layer.weight, config.weight_lr * step_share(layer.weight_quantizer.bits))
                    self.clipped.append(layer.weight)
                if self.learn_weights != 'float' and layer.weight_quantizer.enabled:
                    own = layer.rounding.open(layer.weight, layer.weight_quantizer)
                    if own:
                        self.open.append(layer)
                    for parameter in own:
                        add(parameter, config.rounding_lr, decays=False)
                    if not own:  # AdaRound's up or down holds for one scale only
                        add(layer.weight_quantizer.log_scale, config.weight_scale_lr)
                if layer.bias is not None:
                    add(layer.bias, config.bias_lr)
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
        for state, target, share in batch.parts(limit) if batch else ():
            with weights_once(self.modules), fused_kernels(self.config.compile):
                outputs = self.precision.run(chain, unit, state)
                found.backward(loss_of(outputs, target) * share)
        return found

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
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for quantizer in self.activations:
            quantizer.keep_prob, quantizer.noise = 1.0, random_mask
        for layer in self.open:
            layer.rounding.close()


def unit_modules(chain, unit):
    """The modules whose parameters the unit owns."""
    return [m for leaf in chain.leaves[unit.start:unit.stop] for m in leaf.modules]


def snapshot(modules):
    """Copies of all parameters below `modules`, roundings' own included."""
    return [{n: p.detach().clone() for n, p in m.named_parameters()} for m in modules]


@torch.no_grad()
def restore(modules, saved):
    """Undo to a snapshot; variables a rounding made since then are dropped."""
    for module, values in zip(modules, saved):
        for name, parameter in list(module.named_parameters()):
            if name in values:
                parameter.copy_(values[name])
            else:
                owner, _, leaf = name.rpartition('.')
                setattr(module.get_submodule(owner), leaf, None)


@torch.no_grad()
def _held_out_loss(chain, unit, inputs, targets, indices, loss_of, batch_size, device):
    """What sums over the rows of the entries `indices`, by batches."""
    found = []
    for pick, state in inputs.batches(batch_size, device, indices):
        state, side = chain.run(state, unit.start, unit.stop)
        loss = loss_of(state.tensors + side, collate((targets[i] for i in pick), device))
        found.append(float(loss) * sum(inputs.states[i].rows for i in pick))
    return found


def _mix(quantized, floating, share, noise):
    """QDrop: each input element from the quantized prefix with probability `share`."""
    tensors = tuple(
        mixed(f, q, noise(q, share))
        for q, f in zip(quantized.tensors, floating.tensors))
    return quantized._replace(tensors=tensors)
