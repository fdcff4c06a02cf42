"""What a quantization loop is going to do: parts, units, their order and iterations."""
from dataclasses import replace
from fnmatch import fnmatchcase

from ..errors import UsageError
from ..models import part_chains, whole_chain
from ..models.whole import WHOLE
from ..modules import set_quantization
from ..reconstruction import UnitConfig, build_schedule, share_iterations
from .data import nominal_size


class Planned:
    """Mixin of `PFCRLoop`: its schedules, by POS stage and part.

    All of it follows from config and model; no data is looked at, no checkpoint is wanted.
    """

    def rehearse(self):
        """What a plan needs, from the config alone: no data, no checkpoint."""
        self.arrange()
        size = getattr(self.model, 'input_size', None) or nominal_size(self.runner.cfg)
        self.count([size] * self.calibration['images'])

    def arrange(self):
        """Chains, parts and schedules."""
        self.model.eval()  # no DropPath, no dropout, in any phase
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        set_quantization(self.model, False, False)
        self.chains, self.without_chain = self.chains_of(self.model)
        known = [*self.chains, *self.without_chain]
        stages = self.pos.stages(self.levels or self.head_levels)
        for key, patterns in (
                ('parts', self.parts), ('pos.stage1_parts', self.pos.stage1_parts),
                *((f'pos.steps.{i}.parts', stage.parts) for i, stage in enumerate(stages)
                  if self.pos.steps)):
            for pattern in patterns:
                if not any(fnmatchcase(part, pattern) for part in known):
                    raise UsageError(
                        f'quantize_cfg.{key}: {pattern!r} matches no part; choose of {known}')
        self.schedules, self.stages = {}, {}
        for stage in stages:
            self.stages[stage.number] = stage
            self.schedules[stage.number] = self._schedules(stage, stage is stages[-1])
            if self.levels and not any(self.schedules[stage.number].values()):
                chained = any(fnmatchcase(part, p) for part in self.chains for p in stage.parts)
                why = (f'its levels {stage.levels} are not in quantize_cfg.levels {self.levels}'
                       if chained else f'its parts {stage.parts} have no chain')
                self.note(f'POS stage {stage.number} has no units: {why}')
        if WHOLE in self.chains and not self.schedules[stages[-1].number][WHOLE]:
            self.note(f'the whole detector is no unit: quantize_cfg.parts {self.parts} or the '
                      f"parts of the last stage of POS leave {WHOLE!r} out")
        self._share_iterations()

    def chains_of(self, model):
        """Chains of a model's parts, with that of the whole detector where it is asked for."""
        chains, without = part_chains(model)
        if WHOLE in self.head_levels:
            chains[WHOLE] = whole_chain(model, dict(chains))
        return chains, without

    def count(self, sizes):
        """Take note of the calibration images' sizes (H, W), views not counted."""
        self.held_out = min(self.calibration['held_out'], len(sizes) // 4)
        self.learned_on = len(sizes) - self.held_out
        views = self.calibration['views']
        self.image_sizes = sizes[:self.learned_on] * views + sizes[self.learned_on:]

    def held_out_among(self, numbers):
        """How many images of a stream are held out: one without a box has no place in it.

        Without this, views of images that are learned from would be held out instead.
        """
        return sum(number >= len(self.image_sizes) - self.held_out for number in numbers)

    def plan(self):
        """Units by (POS stage, part), in order: what `run` is going to do."""
        return {(number, part): units
                for number, schedules in self.schedules.items()
                for part, units in schedules.items()}

    def unit_config(self, number, unit):
        """`UnitConfig` of a unit in the stage `number` of POS, its iterations final."""
        stage = self.stages[number]
        heads = () if unit.chain == 'backbone' else (self.head_reconstruction, )
        config = UnitConfig.build(
            unit.level, self.reconstruction, *heads, stage.reconstruction)
        iters = self._iterations.get((number, unit))
        return replace(config, iters=iters or max(1, round(config.iters * stage.shrink)))

    def _share_iterations(self):
        """Scale the iterations of all units to `total_iters`."""
        self._iterations = {}
        if self.total_iters is None:
            return
        units = [(number, unit) for (number, _), found in self.plan().items() for unit in found]
        if self.total_iters < len(units):
            raise UsageError(f'quantize_cfg.total_iters={self.total_iters} is less than one '
                             f'iteration for each of the {len(units)} units')
        counts = [self.unit_config(*unit).iters for unit in units]
        self._iterations = dict(zip(units, share_iterations(counts, self.total_iters)))

    def _schedules(self, stage, last):
        levels = [lv for lv in stage.levels if lv in self.levels]
        schedules = {}
        for part, chain in self.chains.items():
            wanted = all(any(fnmatchcase(part, p) for p in patterns)
                         for patterns in (self.parts, stage.parts))
            wanted = wanted and (last or part != WHOLE)  # nothing comes after the whole
            part_levels = levels if part == 'backbone' else self.head_levels
            schedules[part] = build_schedule(
                chain, part_levels, self.traversal, 'quantize_cfg.levels') if wanted else []
        return schedules
