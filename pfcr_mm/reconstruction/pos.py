"""The Progressive Optimization Strategy: PFCR in two training stages.

The paper's text on POS is not public; METHODS that we read as likely are switches:

quantizer  stage 1 has float weights and channel-wise post-LayerNorm quantizers; an
           exact reparameterisation leads to stage 2 with quantized weights and
           per-tensor quantizers. The granularity of quantization diminishes.
unit       stage 1 is a full sweep; stage 2 sweeps again from a coarser level on,
           with fewer iterations.
operand    stage 1 quantizes activations only, stage 2 weights too.
off        one stage with everything quantized.
steps      the stages that `steps` lists: other methods are told apart by these.
"""
from dataclasses import dataclass, field

from ..errors import UsageError, check_keys, is_number
from .units import LEVELS, check_levels

MODES = ('quantizer', 'unit', 'operand', 'off', 'steps')
# What a step may say, and what it means to leave it out.
_STEP = dict(weights='quantized', activations='quantized', norms='tensor', learn='all',
             levels=None, parts=('*', ), shrink=1.0, reconstruction=None)
_CHOICES = dict(weights=('quantized', 'float'), activations=('quantized', 'float'),
                norms=('tensor', 'channel'), learn=('all', 'scales'))


@dataclass(frozen=True)
class Stage:
    """One training stage of PFCR.

    Args:
        number (int): 1 or 2.
        quantize_weights (bool): False trains float weights under quantized activations.
        final (bool): the model is reparameterised and fully quantized on entry.
        levels (tuple[str]): units to reconstruct.
        parts (tuple[str]): parts of the detector; '*' is all.
        shrink (float): factor on iterations, for who makes the `UnitConfig`s.
        quantize_activations (bool): False leaves activations float.
        learn (str): 'all', or 'scales' for activation scales alone.
        reconstruction (dict): overrides of the method's `reconstruction`.
    """

    number: int
    quantize_weights: bool
    final: bool
    levels: tuple
    parts: tuple = ('*', )
    shrink: float = 1.0
    quantize_activations: bool = True
    learn: str = 'all'
    reconstruction: dict = field(default_factory=dict)

    @property
    def learns(self):
        """What units learn of their weights: 'rounding', 'float' or 'fixed'."""
        if self.learn == 'scales':
            return 'fixed'
        return 'rounding' if self.quantize_weights else 'float'


@dataclass
class POSConfig:
    """The `pos` entry of a PFCR config.

    Levels here are of the backbone; neck and heads have all of theirs (`head_levels`) in every
    stage whose parts they belong to.

    Args:
        mode (str): 'quantizer', 'unit', 'operand', 'off' or 'steps'.
        stage1_levels (list[str]): levels of the first stage ('unit' takes all levels).
        stage1_parts (list[str]): parts of the first stage.
        stage1_shrink (float): factor on the first stage's iterations.
        stage2_start (str): 'unit' only: the level stage 2 starts from.
        stage2_shrink (float): 'unit' only: factor on iterations.
        steps (list[dict]): 'steps' only: the stages. Each may set `weights` and
            `activations` ('quantized', 'float'), `norms` ('tensor', 'channel': quantizers
            after norms before or after reparameterisation), `learn` ('all', 'scales'),
            `levels`, `parts`, `shrink` and overrides of `reconstruction`.
    """

    mode: str = 'quantizer'
    stage1_levels: list = field(default_factory=lambda: ['leaf', 'block'])
    stage1_parts: list = field(default_factory=lambda: ['backbone'])
    stage1_shrink: float = 1.0
    stage2_start: str = 'block'
    stage2_shrink: float = 0.5
    steps: list = field(default_factory=list)

    def __post_init__(self):
        if self.mode not in MODES:
            raise UsageError(f'pos.mode={self.mode!r} is not known; choose one of {MODES}')
        check_levels(self.stage1_levels, 'pos.stage1_levels')
        check_levels([self.stage2_start], 'pos.stage2_start')
        if (self.mode == 'steps') != bool(self.steps):
            raise UsageError("pos.steps lists stages, and belongs to pos.mode='steps'")
        for key in ('stage1_shrink', 'stage2_shrink'):
            _check_shrink(getattr(self, key), f'pos.{key}')
        folded = False
        for i, step in enumerate(self.steps):
            _check_step(step, f'pos.steps.{i}')
            by_channel = step.get('norms') == 'channel'
            if folded and by_channel:
                raise UsageError(f"pos.steps.{i}.norms='channel' comes after a step with "
                                 "'tensor', which has folded the channels' scales")
            folded = not by_channel

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
        if self.mode == 'steps':
            return [_step_stage(number, {**_STEP, **step}, levels)
                    for number, step in enumerate(self.steps, 1)]
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


def _check_step(step, key):
    check_keys(step, _STEP, key)
    step = {**_STEP, **step}
    for name, choices in _CHOICES.items():
        if step[name] not in choices:
            raise UsageError(f'{key}.{name}={step[name]!r} is not known; choose one of {choices}')
    if step['norms'] == 'channel' and step['weights'] == 'quantized':
        raise UsageError(f"{key}: weights are quantized after reparameterisation, norms='tensor'")
    _check_shrink(step['shrink'], f'{key}.shrink')
    parts = step['parts']
    if not (isinstance(parts, str) or isinstance(parts, (list, tuple))
            and all(isinstance(part, str) for part in parts)):
        raise UsageError(f'{key}.parts={parts!r} is no list of name patterns')
    check_levels(step['levels'] or (), f'{key}.levels')


def _check_shrink(value, key):
    if not (is_number(value) and value > 0):
        raise UsageError(f'{key}={value!r} is not a number above 0')


def _step_stage(number, step, levels):
    parts = step['parts']
    return Stage(
        number, step['weights'] == 'quantized', step['norms'] == 'tensor',
        levels if step['levels'] is None else tuple(step['levels']),
        (parts, ) if isinstance(parts, str) else tuple(parts), step['shrink'],
        step['activations'] == 'quantized', step['learn'], dict(step['reconstruction'] or {}))
