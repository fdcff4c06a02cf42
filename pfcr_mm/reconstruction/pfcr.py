"""Progressive Fine-to-Coarse Reconstruction of one chain (arXiv 2412.14633).

Reads top-down like the paper: leaves are reconstructed, merged into blocks, blocks
reconstructed and merged, and so on up to the whole chain.
"""
import torch

from ..modules import QuantLayer
from .boundaries import Boundaries
from .build_loss import build_loss, loss_wants
from .capture import Targets, advance
from .first_values import take_first_values
from .guided_losses import LossContext
from .optimize import UnitRecord, reconstruct
from .views import UNIT, UnitView, view_of


class ChainReconstructor:
    """Walks a schedule over a chain, with the streams it needs.

    In post-order a unit starts where a finer one started, and everything before is
    final, so only boundaries where a later unit starts are kept.

    Args:
        chain, teacher_chain (Chain): of the quantized and of the float model.
        quantized, floating (Stream): what flows into the first leaf of each.
        device (torch.device): where to compute.
        held_out (int): images for accepting a unit.
        seed (int): draws batches, with the unit's place in the schedule.
        cache (FeatureCache | None): keeps the streams; None keeps them in memory as they are.
        faults (Faults | None): what to do where memory runs out or a loss is no number.
        at_once (int | None): images computed together at most, whatever a step's batch.
    """

    def __init__(self, chain, teacher_chain, quantized, floating, device, held_out, seed,
                 cache=None, faults=None, at_once=None):
        self.chain, self.teacher_chain = chain, teacher_chain
        self.device, self.held_out, self.seed = device, held_out, seed
        self.cache, self.faults, self.at_once = cache, faults, at_once
        self.quantized = Boundaries(chain, quantized, device, cache, at_once)
        self.floating = Boundaries(teacher_chain, floating, device, cache, at_once)
        self.curvatures = {}  # by boundary, see `LossContext`

    def paths(self):
        """How the streams that are kept came to be: what `follow` needs."""
        return dict(quantized=dict(self.quantized.paths), floating=dict(self.floating.paths))

    def follow(self, paths):
        """Get the streams back that a reconstructor of the same model had, to the bit."""
        self.quantized.follow(paths['quantized'])
        self.floating.follow(paths['floating'])

    def run(self, schedule, config_of, stage, on_unit_start=None, on_unit_end=None, on_step=None,
            first=0):
        """Reconstruct the units of `schedule` in order.

        Args:
            schedule (list[Unit]): see `build_schedule`.
            config_of (callable): unit -> UnitConfig, its iterations final.
            stage (Stage): the stage of POS.
            on_unit_start, on_unit_end, on_step (callable | None): called with the
                unit, with its UnitRecord, and with (step, loss).
            first (int): units that are done already; `follow` first.

        Returns:
            list[UnitRecord]: one a unit.
        """
        records = []
        for number, unit in enumerate(schedule[first:], first):
            if on_unit_start is not None:
                on_unit_start(unit)
            record = self.reconstruct_unit(unit, config_of(unit), stage, number, on_step)
            records.append(record)
            self._move_on(unit, schedule[number + 1:])
            if on_unit_end is not None:
                on_unit_end(record)
        return records

    def reconstruct_unit(self, unit, config, stage, number, on_step=None):
        """Reconstruct one unit; what the quantized chain gave behind it is forgotten."""
        inputs = self.quantized.at(unit.start)
        float_inputs = self.floating.at(unit.start)
        wants = loss_wants(config.loss)
        chain, float_chain = (view_of(c, unit, wants, self.teacher_chain)
                              for c in (self.chain, self.teacher_chain))
        targets = self._targets(float_chain, unit, float_inputs)
        seed = self.seed * 100003 + number
        context = self._context(
            float_chain, unit, len(targets[0]) if targets else 0, targets.streams[0],
            min(config.batch_size, self.at_once or config.batch_size))
        loss_of = build_loss(config.loss, targets, self.chain.channel_axis, context)
        take_first_values(
            loss_of, context.mixed, chain, unit, inputs, targets, config, self.held_out,
            self.device, self.faults.tell if self.faults else print, self.at_once)
        with torch.random.fork_rng([self.device] if self.device.type == 'cuda' else []):
            torch.manual_seed(seed)  # for what does not draw by image; batches do
            result = reconstruct(
                chain, unit, inputs, float_inputs, targets, config, stage.learns, self.held_out,
                torch.Generator().manual_seed(seed), self.device, on_step, self.faults, loss_of,
                self.at_once)

        self.quantized.drop_after(unit.start)  # computed before this unit changed
        return UnitRecord(unit.name, unit.chain, unit.level, stage.number, **result)

    def _targets(self, float_chain, unit, inputs):
        """What the float chain gives behind a unit: it may be there from a finer one."""
        # what follows a single layer is not known until its leaf is run
        at_boundary = unit.stop < len(self.chain.leaves) and not unit.layer
        plain = at_boundary and float_chain is self.teacher_chain and not any(
            leaf.sides for leaf in self.chain.leaves[unit.start:unit.stop])
        if plain:
            return Targets(self.floating.at(unit.stop))
        outputs, sides = advance(
            float_chain, inputs, unit.start, unit.stop, self.device, self.at_once, self.cache)
        if at_boundary:
            self.floating.put(unit.stop, unit.start, outputs)
        return Targets(outputs, sides)

    def _context(self, float_chain, unit, outputs, states, batch_size):
        view = float_chain
        if view is self.teacher_chain:
            view = UnitView(float_chain, unit, (), float_chain)
            view.sizes = {UNIT: outputs}
        return LossContext(view, states, self.device, batch_size, curvatures=self.curvatures)

    def _move_on(self, unit, upcoming):
        """Run the streams to the next unit, if it is further on than this one.

        Of the boundaries those stay where a later unit starts (and 0: all can be run from it),
        of the float ones also those where it ends: its targets.
        """
        starts, stops = ({getattr(later, end) for later in upcoming} for end in ('start', 'stop'))
        self.curvatures = {stop: of for stop, of in self.curvatures.items() if stop in stops}
        for boundaries, needed in ((self.quantized, starts), (self.floating, starts | stops)):
            if upcoming and upcoming[0].start >= unit.stop:
                boundaries.at(upcoming[0].start)
            boundaries.keep_only(needed)


def harden(model):
    """Fix all learned roundings below `model` to integers.

    Returns:
        int: number of layers whose weight is integer now.
    """
    count = 0
    for layer in model.modules():
        if isinstance(layer, QuantLayer) and layer.weight_quantizer.enabled:
            layer.harden()
            count += 1
    return count
