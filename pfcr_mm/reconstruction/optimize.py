"""Reconstruct one unit: make its quantized output match its float output."""
import itertools
import math
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from .. import parallel
from ..modules import weights_once
from ..quantizers.blocks import mixed
from .build_loss import build_loss, check_shareable
from .capture import split
from .early_stop import EarlyStop, Plateau
from .faults import ALL_FINITE, BatchLimit, Faults, NotFinite, find_nonfinite, split_batch
from .feed import collate, looking_ahead, made_ahead
from .learned_parameters import LearnedParameters
from .noise import ImageNoise


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
    # two, since the next batch may be mixed while one is learned
    noise, mixing = (ImageNoise(generator.initial_seed()) for _ in range(2))
    buckets = [[i for i in bucket if i in set(learn_on)] for bucket in roll.buckets]
    buckets = [b for b in buckets if b]
    sources = [targets]  # that a step reads, see Batch.collect
    if config.input_mix > 0:
        sources.append(quantized_inputs)
    if config.input_mix < 1:
        sources.append(float_inputs)
    plateau, steps = Plateau(EarlyStop.build(config.early_stop)), 0
    every = 1 if device.type == 'cpu' else 10  # looking at a loss makes a GPU wait

    def collect(item):
        step, (pick, following) = item
        mine = held(pick)
        for source in sources if following else ():
            source.ahead(held(following))
        batch = Batch.collect(
            quantized_inputs, float_inputs, targets, mine, step, noise, mixing, device,
            config.input_mix, roll.rows_of(pick)) if mine else None
        return (step, mine, batch), batch.tensors if batch else ()

    try:
        check(before, 'loss before learning', held(accept_on)[:1])
        picks = enumerate(looking_ahead(_picks(buckets, config, generator)))
        with _undone_on_error(modules, saved), learned, closing(made_ahead(
                collect, picks if learned.parameters else (), device)) as batches:
            for step, mine, batch in batches:
                progress = step / config.iters
                learned.set_progress(progress)
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
            if learned.not_recorded:
                faults.not_recorded(learned.not_recorded)
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


def _picks(buckets, config, generator):
    """Yield images of each step's batch, all of one bucket, which are drawn by their sizes."""
    weights = torch.tensor([float(len(b)) for b in buckets])
    for _ in range(config.iters):
        bucket = buckets[torch.multinomial(weights, 1, generator=generator).item()]
        order = torch.randperm(len(bucket), generator=generator)[:config.batch_size]
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

    @property
    def tensors(self):
        """Of state and target."""
        return self.state.tensors + self.target

    @classmethod
    def collect(cls, quantized, floating, targets, indices, step, noise, mixing, device, input_mix,
                rows):
        """From streams and targets; `mixing` draws which inputs, `rows` has the whole batch."""
        numbers = [quantized.numbers[i] for i in indices]
        sizes = [quantized.states[i].rows for i in indices]
        state = (quantized if input_mix > 0 else floating).batch(indices, device)
        if 0 < input_mix < 1:
            mixing.begin('input', step, numbers, sizes)
            state = _mix(state, floating.batch(indices, device), input_mix, mixing)
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
