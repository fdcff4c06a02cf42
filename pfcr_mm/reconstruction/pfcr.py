"""Progressive Fine-to-Coarse Reconstruction of one chain (arXiv 2412.14633).

Reads top-down like the paper: leaves are reconstructed, merged into blocks, blocks
reconstructed and merged, and so on up to the whole chain.
"""
from dataclasses import replace

import torch

from ..modules import QuantLayer
from .capture import advance
from .optimize import UnitRecord, reconstruct


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
        cache_dtype (torch.dtype | None): storage type of streams.
    """

    def __init__(self, chain, teacher_chain, quantized, floating, device, held_out, seed,
                 cache_dtype=None):
        self.chain, self.teacher_chain = chain, teacher_chain
        self.device, self.held_out, self.seed = device, held_out, seed
        self.cache_dtype = cache_dtype
        self.quantized, self.floating = {0: quantized}, {0: floating}

    def run(self, schedule, config_of, stage, on_unit_start=None, on_unit_end=None, on_step=None):
        """Reconstruct the units of `schedule` in order.

        Args:
            schedule (list[Unit]): see `build_schedule`.
            config_of (callable): level -> UnitConfig.
            stage (Stage): the stage of POS.
            on_unit_start, on_unit_end, on_step (callable | None): called with the
                unit, with its UnitRecord, and with (step, loss).

        Returns:
            list[UnitRecord]: one a unit.
        """
        records = []
        for number, unit in enumerate(schedule):
            if on_unit_start is not None:
                on_unit_start(unit)
            config = config_of(unit.level)
            config = replace(
                config, iters=max(1, round(config.iters * stage.shrink)))
            record = self.reconstruct_unit(unit, config, stage, number, on_step)
            records.append(record)
            if on_unit_end is not None:
                on_unit_end(record)
            self._forget(schedule[number + 1:])
        return records

    def reconstruct_unit(self, unit, config, stage, number, on_step=None):
        """Reconstruct one unit and move the quantized stream past it."""
        inputs = self._boundary(self.quantized, self.chain, unit.start)
        float_inputs = self._boundary(self.floating, self.teacher_chain, unit.start)
        float_outputs, float_side = advance(
            self.teacher_chain, float_inputs, unit.start, unit.stop, self.device,
            dtype=self.cache_dtype)
        targets = [
            s.tensors + side.tensors
            for s, side in zip(float_outputs.states, float_side.states)
        ]
        seed = self.seed * 100003 + number
        with torch.random.fork_rng([self.device] if self.device.type == 'cuda' else []):
            torch.manual_seed(seed)  # QDrop's masks; batches come from the generator
            result = reconstruct(
                self.chain, unit, inputs, float_inputs, targets, config,
                'rounding' if stage.quantize_weights else 'float', self.held_out,
                torch.Generator().manual_seed(seed), self.device, on_step)

        for boundary in [b for b in self.quantized if b > unit.start]:
            del self.quantized[boundary]  # computed before this unit changed
        if unit.stop < len(self.chain.leaves):
            self.floating[unit.stop] = float_outputs
            self.quantized[unit.stop], _ = advance(
                self.chain, inputs, unit.start, unit.stop, self.device, dtype=self.cache_dtype)
        return UnitRecord(
            unit.name, unit.chain, unit.level, stage.number, iters=config.iters, **result)

    def _boundary(self, streams, chain, position):
        """The stream at `position`, run on from the nearest boundary that is kept."""
        if position not in streams:
            nearest = max(b for b in streams if b < position)
            streams[position], _ = advance(
                chain, streams[nearest], nearest, position, self.device, dtype=self.cache_dtype)
        return streams[position]

    def _forget(self, upcoming):
        """Drop boundaries where no later unit starts (0 stays: all can be run from it)."""
        needed = {unit.start for unit in upcoming} | {0}
        for streams in (self.quantized, self.floating):
            for boundary in [b for b in streams if b not in needed]:
                del streams[boundary]


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
