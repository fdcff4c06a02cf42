"""The plan before, and a line a unit while reconstructing."""
import time

from mmengine.hooks import Hook

from ...reconstruction import UnitConfig, traversal_string
from ...registry import HOOKS


@HOOKS.register_module()
class ProgressHook(Hook):
    """Prints the plan, then progress with the time that is left."""

    priority = 'NORMAL'

    def before_quantize(self, runner):
        """Print what is going to happen."""
        loop = runner.quantize_loop
        for line in plan_lines(loop):
            runner.logger.info(line)
        self.work = [self._cost(loop, unit) for units in loop.plan().values() for unit in units]
        self.done, self.spent = 0, 0.0

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
    def _cost(loop, unit):
        """Rough work of a unit: iterations times leaves, plus moving the streams on."""
        base = loop.reconstruction if unit.chain == 'backbone' else loop.head_reconstruction
        config = UnitConfig.build(base, unit.level)
        return (config.iters + 20) * (unit.stop - unit.start)


def plan_lines(loop):
    """The plan: bits, layers, units of each part, images, estimated memory.

    Args:
        loop (PFCRLoop): prepared.

    Returns:
        list[str]: lines of text.
    """
    quant = loop.model.quant_config
    census = loop.model.census
    skipped = [record for record in census if record.skipped_reason]
    lines = [
        f'Plan: W{quant.weight_bits}A{quant.activation_bits}, first and last layers '
        f"{quant.first_last_bits or 'alike'} bits, {len(census) - len(skipped)} layers "
        f'quantized, {len(skipped)} skipped',
        f'  calibration: {len(loop.images)} training images, '
        f'{loop.held_out} of them to accept units by; '
        f"method {loop.calibration['method']}",
        f'  POS: {loop.pos.mode}; weight rounding: {quant.rounding}; {loop.traversal}',
    ]
    for (stage, part), units in loop.plan().items():
        if units:
            lines.append(f'  stage {stage} {part}: {len(units)} units: {traversal_string(units)}')
    for part, reason in loop.without_chain.items():
        lines.append(f'  {part}: calibrated only ({reason})')
    for record in skipped:
        lines.append(f'  skipped {record.name}: {record.skipped_reason}')
    lines.append(f'  cached activations of the backbone: about {estimate_cache_mb(loop):.0f} MB')
    return lines


def estimate_cache_mb(loop):
    """Memory of the backbone's streams: inputs, targets and boundaries, in MB.

    Measured on one image: a unit needs its quantized and float input and its
    target, and the stack of open boundaries is at most log2(blocks) + 2 deep.
    """
    chain = loop.teacher_chains.get('backbone')
    if chain is None:
        return 0.0
    import torch

    from ...models.chain import State
    with torch.no_grad():
        state = State((loop.images[0][0].to(loop.device), ))
        largest = 0
        for leaf in chain.leaves:
            state, side = leaf.forward(state)
            tensors = state.tensors + side
            largest = max(largest, sum(t.numel() for t in tensors))
    blocks = len({leaf.block for leaf in chain.leaves if leaf.block is not None})
    depth = 2 + max(1, blocks).bit_length()
    width = 4 if loop.cache_dtype is None else torch.finfo(loop.cache_dtype).bits // 8
    return largest * (2 * depth + 1) * width * len(loop.images) / 1e6


def _clock(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'
