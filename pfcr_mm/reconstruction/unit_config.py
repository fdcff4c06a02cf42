"""How units are optimised: rates, iterations, what is mixed and what is stopped."""
import itertools
from dataclasses import dataclass, fields

from ..errors import UsageError, check_keys, is_number
from ..models.whole import WHOLE
from .build_loss import check_loss
from .early_stop import EarlyStop
from .precision import check_autocast
from .units import check_levels

# From end to end a few hundred images teach scales, biases and norms; weights learn the images.
_WHOLE = dict(
    loss='detections', weight_lr=0.0, adaround_lr=0.0, weight_scale_lr=0.0, scale_lr=1e-3,
    bias_lr=1e-3, norm_lr=1e-3, keep_prob=1.0, input_mix=1.0)


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
        cuda_graphs (bool): steps on a GPU are recorded as CUDA graphs and replayed, where they
            can be: one process, whole batches, nothing drawn (keep_prob=1), no AdaRound, neither
            float16 nor `compile`.
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
    cuda_graphs: bool = False

    def __post_init__(self):
        for name, least in (('iters', 1), ('batch_size', 1)):
            value = getattr(self, name)
            if not is_number(value) or not isinstance(value, int) or value < least:
                raise UsageError(f'{name}={value!r} is not an integer of {least} or more')
        for name in ('weight_lr', 'adaround_lr', 'scale_lr', 'weight_scale_lr', 'bias_lr',
                     'norm_lr', 'clip_grad'):
            value = getattr(self, name)
            if value is None and name == 'adaround_lr':
                continue
            if not is_number(value) or value < 0:
                raise UsageError(f'{name}={value!r} is not a number of 0 or more')
        if not 0 <= self.input_mix <= 1:
            raise UsageError(f'input_mix={self.input_mix!r} is not from 0 to 1')
        if not 0 < self.keep_prob <= 1:
            raise UsageError(f'keep_prob={self.keep_prob!r} is not above 0 and at most 1')
        EarlyStop.build(self.early_stop)
        check_autocast(self.autocast)
        for name in ('compile', 'cuda_graphs'):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f'{name}={getattr(self, name)!r} is neither True nor False')

    @property
    def rounding_lr(self):
        """`adaround_lr` in force."""
        return min(20 / self.iters, 0.1) if self.adaround_lr is None else self.adaround_lr

    @classmethod
    def build(cls, level, *layers):
        """The recipe of a level.

        Args:
            level (str): of the unit.
            *layers (dict): of the config, each laid over those before; what its `per_level`
                says of the level goes over what it says of all. The whole detector has a recipe
                of its own, which only `per_level` of any of them changes.
        """
        of_all = [{k: v for k, v in layer.items() if k != 'per_level'} for layer in layers]
        of_level = [layer.get('per_level', {}).get(level, {}) for layer in layers]
        if level == WHOLE:
            order = [*of_all, _WHOLE, *of_level]
        else:
            order = itertools.chain(*zip(of_all, of_level))
        merged = {}
        for own in order:
            merged.update(own)
        return cls(**merged)

    @classmethod
    def check(cls, given, key):
        """Raise UsageError unless `given`, whose name is `key`, may be a layer of `build`."""
        if not isinstance(given, dict):
            raise UsageError(f'{key}={given!r} is no dict')
        per_level = given.get('per_level', {})
        if not isinstance(per_level, dict):
            raise UsageError(f'{key}.per_level={per_level!r} is no dict')
        check_levels(per_level, f'{key}.per_level')
        of_all = {k: v for k, v in given.items() if k != 'per_level'}
        for where, own in ((key, of_all), *((f'{key}.per_level.{level}', own)
                                            for level, own in per_level.items())):
            if not isinstance(own, dict):
                raise UsageError(f'{where}={own!r} is no dict')
            check_keys(own, [f.name for f in fields(cls)], where)
            check_loss(own.get('loss', cls.loss), f'{where}.loss')
            try:
                cls(**own)
            except UsageError as error:  # it begins with the key
                raise UsageError(f'{where}.{error}') from None
