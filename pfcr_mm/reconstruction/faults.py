"""What can go wrong while a unit is reconstructed: no memory left, numbers that are none."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..errors import FaultError
from ..modules import quantizers_of

ON_NONFINITE = ('restore', 'stop')
ALL_FINITE = 'all layers are finite'


@dataclass
class Faults:
    """What to do about faults, and whom to tell.

    Args:
        tell (Callable): takes a line for log and report.
        on_nonfinite (str): 'restore' undoes the unit and goes on, 'stop' ends the run.
        name_of (Callable): full name of a module.
        said (set): what is told once a run, and has been.
    """

    tell: Callable = print
    on_nonfinite: str = 'restore'
    name_of: Callable = lambda module: type(module).__name__
    said: set = field(default_factory=set)

    def nonfinite(self, found):
        """A unit that met NaN or Inf is restored: tell it and go on, or stop."""
        if self.on_nonfinite == 'stop':
            raise FaultError(
                f"{found}; the unit is as it was before. quantize_cfg.on_nonfinite='restore' "
                'with --resume goes on without it')
        self.tell(f'{found}; the unit is restored')

    def left_out(self, unit, count, steps):
        """Steps of a unit whose gradients had no room in float16: tell it where they are many."""
        if count > 0.1 * steps:
            self.tell(f'{unit.name}: {count} of {steps} steps were left out, their gradients '
                      "overflow float16; autocast='bfloat16' has the range")

    def not_recorded(self, why):
        """Steps that the config wants as CUDA graphs cannot be: tell it once for each reason."""
        if why not in self.said:
            self.said.add(why)
            self.tell(f'steps are not recorded, whatever cuda_graphs says: {why}')


class NotFinite(Exception):  # noqa: N818  it is told, not shown
    """A loss of a unit is NaN or Inf.

    Args:
        loss (float): NaN or Inf.
        what (str): which loss.
        unit (Unit): whose.
        cause (str): where it comes from.
    """

    def __init__(self, loss, what, unit, cause):
        super().__init__(f'{unit.name}: the {what} is {loss}: {cause}')
        self.loss = loss


class BatchLimit:
    """How many entries of a batch are computed at a time: fewer where memory runs out.

    Args:
        size (int): to begin with.
        where (str): what runs out of memory, to be told.
        tell (Callable): takes a line.
        at_once (int | None): more are never computed together; None is no bound.
    """

    def __init__(self, size, where, tell, at_once=None):
        self.size, self.where, self.tell = min(size, at_once or size), where, tell

    def run(self, function):
        """Return function(size); where it runs out of memory, again with half the size."""
        size = self.size
        while True:
            try:
                return function(size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # out of the handler, or its traceback would keep what did not fit
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size == 1:
                raise FaultError(
                    f'out of memory in {self.where} with one image at a time: leave out the '
                    'coarsest of quantize_cfg.levels and head_levels, set fewer '
                    'quantize_cfg.rois, or use smaller images; --resume goes on')
            size = self.size = -(-size // 2)
            self.tell(f'out of memory in {self.where}: its batches are computed {size} images '
                      'at a time; the steps of learning stay the same')


def is_out_of_memory(error):
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in (
            "can't allocate memory", 'CUBLAS_STATUS_ALLOC_FAILED', 'CUDNN_STATUS_ALLOC_FAILED')))


def split_batch(state, target, sizes, limit):
    """Parts of a batch of at most `limit` entries each.

    Args:
        state (State): the batch.
        target (tuple[Tensor]): what it should become.
        sizes (list[int]): rows of each entry.
        limit (int): entries a part.

    Yields:
        tuple[State, tuple[Tensor], int, slice]: state, target, rows, and which entries they are.
    """
    total, start = sum(sizes), 0
    for k in range(0, len(sizes), limit):
        stop = start + sum(sizes[k:k + limit])
        if (start, stop) == (0, total):
            yield state, target, total, slice(None)
        elif stop > start:
            yield (state._replace(tensors=tuple(t[start:stop] for t in state.tensors)),
                   tuple(t[start:stop] for t in target), stop - start,
                   slice(k, k + limit))
        start = stop


@torch.no_grad()
def find_nonfinite(chain, unit, state, target, name_of):
    """Where the first NaN or Inf of a unit arises, in words.

    Looks at targets and inputs, then at all parameters and scales, then at what each
    module puts out, in the order of execution.
    """
    if not _all_finite(target):
        return 'the float model itself puts out NaN or Inf there'
    if not _all_finite(state.tensors):
        return 'NaN or Inf is in its input already'
    modules = [m for leaf in chain.leaves[unit.start:unit.stop] for m in leaf.modules]
    for root in modules:
        for module in root.modules():
            for key, value in module.named_parameters(recurse=False):
                if not torch.isfinite(value).all():
                    return f'{name_of(module)}: its {key} has NaN or Inf'
        for _, quantizer in quantizers_of(root):
            if not torch.isfinite(quantizer.scale).all() or (quantizer.scale == 0).any():
                return f'{name_of(quantizer)}: its scale has left the range of numbers'
    found = []

    def look(module, args, output):
        tensors = output if isinstance(output, (tuple, list)) else (output, )
        if not found and not _all_finite(t for t in tensors if torch.is_tensor(t)):
            found.append(module)

    handles = [m.register_forward_hook(look) for root in modules for m in root.modules()]
    try:
        chain.run(state, unit.start, unit.stop)
    finally:
        for handle in handles:
            handle.remove()
    return f'the output of {name_of(found[0])} has NaN or Inf' if found else ALL_FINITE


def check_seen(seen):
    """Raise FaultError, naming the layer, where calibration has seen NaN or Inf."""
    for name, reservoir in {**seen.layers, **seen.operands}.items():
        if reservoir.low is not None and not _all_finite((reservoir.low, reservoir.high)):
            raise FaultError(
                f'the input of {name} has NaN or Inf on the calibration images: look at the '
                'float checkpoint and at the images')


def _all_finite(tensors):
    return all(torch.isfinite(t).all() for t in tensors)
