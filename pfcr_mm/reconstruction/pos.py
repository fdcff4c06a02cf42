"""The Progressive Optimization Strategy: PFCR in two training stages.

The paper's text on POS is not public; METHODS that we read as likely are switches:

quantizer  stage 1 has float weights and channel-wise post-LayerNorm quantizers; an
           exact reparameterisation leads to stage 2 with quantized weights and
           per-tensor quantizers. The granularity of quantization diminishes.
unit       stage 1 is a full sweep; stage 2 sweeps again from a coarser level on,
           with fewer iterations.
operand    stage 1 quantizes activations only, stage 2 weights too.
off        one stage with everything quantized.
"""
from dataclasses import dataclass, field

from ..errors import UsageError
from .units import LEVELS, check_levels

MODES = ('quantizer', 'unit', 'operand', 'off')


@dataclass(frozen=True)
class Stage:
    """One training stage of PFCR.

    Args:
        number (int): 1 or 2.
        quantize_weights (bool): False trains float weights under quantized activations.
        final (bool): the model is reparameterised and fully quantized on entry.
        levels (tuple[str]): units to reconstruct.
        parts (tuple[str]): parts of the detector; '*' is all.
        shrink (float): factor on iterations.
    """

    number: int
    quantize_weights: bool
    final: bool
    levels: tuple
    parts: tuple = ('*', )
    shrink: float = 1.0


@dataclass
class POSConfig:
    """The `pos` entry of a PFCR config.

    Args:
        mode (str): 'quantizer', 'unit', 'operand' or 'off'.
        stage1_levels (list[str]): levels of the first stage ('unit' takes all levels).
        stage1_parts (list[str]): parts of the first stage.
        stage1_shrink (float): factor on the first stage's iterations.
        stage2_start (str): 'unit' only: the level stage 2 starts from.
        stage2_shrink (float): 'unit' only: factor on iterations.
    """

    mode: str = 'quantizer'
    stage1_levels: list = field(default_factory=lambda: ['leaf', 'block'])
    stage1_parts: list = field(default_factory=lambda: ['backbone'])
    stage1_shrink: float = 1.0
    stage2_start: str = 'block'
    stage2_shrink: float = 0.5

    def __post_init__(self):
        if self.mode not in MODES:
            raise UsageError(f'pos.mode={self.mode!r} is not known; choose one of {MODES}')
        check_levels(self.stage1_levels, 'pos.stage1_levels')
        check_levels([self.stage2_start], 'pos.stage2_start')

    def stages(self, levels):
        """The training stages, given the levels of the whole method.

        Args:
            levels (list[str]): fine to coarse.

        Returns:
            list[Stage]: one (off) or two.
        """
        levels = tuple(levels)
        if self.mode == 'off':
            return [Stage(1, True, True, levels)]
        if self.mode == 'unit':
            start = LEVELS.index(self.stage2_start)
            coarser = tuple(level for level in levels if LEVELS.index(level) >= start)
            return [Stage(1, True, True, levels),
                    Stage(2, True, True, coarser, shrink=self.stage2_shrink)]
        # 'quantizer' keeps post-norm quantizers channel-wise in stage 1, 'operand' does not
        first = Stage(
            1, False, self.mode == 'operand', tuple(self.stage1_levels),
            tuple(self.stage1_parts), self.stage1_shrink)
        return [first, Stage(2, True, True, levels)]
