"""The plan before, and a line a unit while reconstructing."""
import time
from collections import Counter

import torch
from mmengine.hooks import Hook

from ... import parallel
from ...reconstruction import traversal_string
from ...reconstruction.memory import stream_elements
from ...registry import HOOKS
from ..augment import retargeted_views


@HOOKS.register_module()
class ProgressHook(Hook):
    """Prints the plan, then progress with the time that is left."""

    priority = 'NORMAL'

    def before_quantize(self, runner):
        """Print what is going to happen."""
        loop = runner.quantize_loop
        for line in plan_lines(loop):
            runner.logger.info(line)
        self.work = [self._cost(loop, number, unit)
                     for (number, _), units in loop.plan().items() for unit in units]
        self.done = len(loop.records)  # of a run that goes on
        self.spent = sum(record.seconds for record in loop.records)

    def before_unit(self, runner, unit):
        """Start the clock."""
        self.began = time.time()

    def after_unit(self, runner, record):
        """One line: where we are, what the unit gained, how long the rest takes."""
        self.done += 1
        self.spent += time.time() - self.began
        finished = sum(self.work[:self.done])
        left = self.spent / max(1e-9, finished) * (sum(self.work) - finished)
        verdict = 'accepted' if record.accepted else 'restored'
        runner.logger.info(
            f'[{self.done}/{len(self.work)}] stage {record.pos_stage} {record.level:8s} '
            f'{record.name:44s} loss {record.loss_before:.5f} -> {record.loss_after:.5f} '
            f'{verdict}, {record.seconds:.1f} s, {_clock(left)} left')

    @staticmethod
    def _cost(loop, number, unit):
        """Rough work of a unit: iterations times leaves, plus moving the streams on."""
        config = loop.unit_config(number, unit)
        return (config.iters + 20) * (unit.stop - unit.start)


def plan_lines(loop):
    """The plan: bits, layers, units of each part, images, estimated memory.

    Args:
        loop (PFCRLoop): prepared or rehearsed.

    Returns:
        list[str]: lines of text.
    """
    quant = loop.model.quant_config
    census = loop.model.census
    skipped = [record for record in census if record.skipped_reason]
    views, cutmix, retargeted = (
        loop.calibration[key] for key in ('views', 'cutmix', 'retargeted'))
    mixed = f', {cutmix:.0%} of the further ones with CutMix' if cutmix and views > 1 else ''
    if moved := retargeted_views(views, retargeted):
        mixed += f', {moved} of them taken for another class'
    height, width = max(loop.image_sizes, key=lambda size: size[0] * size[1])
    lines = [
        f'Plan: W{quant.weight_bits}A{quant.activation_bits}, first and last layers '
        f"{quant.first_last_bits or 'alike'} bits, {len(census) - len(skipped)} layers "
        f'quantized, {len(skipped)} skipped',
        f'  bits: {_counts(map(_bits, census))}',
        f'  parts: {_counts(_part(loop, record.name) for record in census)} (layers)',
        f'  calibration: {loop.learned_on + loop.held_out} training images, {loop.held_out} of '
        f"them to accept units by, the others in {views} views{mixed}; "
        f"method {loop.calibration['method']}; up to {width}x{height} pixels",
        f'  POS: {loop.pos.mode}; weight rounding: {quant.rounding}; {loop.traversal}',
    ]
    cached = {number: cache_mb(loop, number) for number in loop.schedules}
    for (stage, part), units in loop.plan().items():
        if units:
            lines.append(f'  stage {stage} {part}: {len(units)} units, about '
                         f'{cached[stage][part]:.0f} MB: {traversal_string(units)}')
    for part, reason in loop.without_chain.items():
        lines.append(f'  {part}: calibrated only ({reason})')
    for reason, names in _grouped(skipped).items():
        lines.append(f'  skipped {names[0]}' + (
            f' and {len(names) - 1} more' if len(names) > 1 else '') + f': {reason}')
    peak, part = max(((mb, part) for parts in cached.values() for part, mb in parts.items()),
                     default=(0, 'nothing'))
    size = parallel.world_size()
    each = f' in each of {size} processes' if size > 1 else ''
    cached = (peak + images_mb(loop)) / size
    limit = loop.cache.limit / 1e6
    where = '' if cached <= limit else f', {limit:.0f} MB in memory, the rest in files'
    lines.append(f'  cached activations: about {cached:.0f} MB at most{each} ({part}){where}')
    return lines


def cache_mb(loop, stage):
    """Memory of the cached streams of each part, in MB.

    Args:
        loop (PFCRLoop): prepared or rehearsed.
        stage (int): number of the POS stage.

    Returns:
        dict[str, float]: by part.
    """
    width = 4 if loop.cache.dtype is None else torch.finfo(loop.cache.dtype).bits // 8
    pixels = sum(height * width for height, width in loop.image_sizes)
    elements = stream_elements(
        loop.model, loop.chains, loop.schedules[stage], pixels, len(loop.image_sizes), loop.rois)
    return {part: count * width / 1e6 for part, count in elements.items()}


def images_mb(loop):
    """Memory of the calibration images themselves, in MB."""
    return sum(3 * 4 * height * width for height, width in loop.image_sizes) / 1e6


def _bits(record):
    if record.skipped_reason:
        return 'float'
    weight = '' if record.weight_bits is None else f'W{record.weight_bits}'
    return f"{weight}A{record.activation_bits}{'' if weight else ' (matmul)'}"


def _part(loop, name):
    """The part that a layer belongs to, longest name first."""
    parts = sorted([*loop.chains, *loop.without_chain], key=len, reverse=True)
    return next((part for part in parts if name.startswith(f'{part}.')), 'elsewhere')


def _counts(labels):
    return ', '.join(f'{count} {label}' for label, count in Counter(labels).items())


def _grouped(records):
    """Names of skipped layers by reason."""
    groups = {}
    for record in records:
        groups.setdefault(record.skipped_reason, []).append(record.name)
    return groups


def _clock(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'
