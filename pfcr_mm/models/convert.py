"""Swap the layers of a model for quantized ones, in place, and take the census."""
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase

from mmcv.cnn.bricks import wrappers
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import UsageError, check_keys
from ..modules import Matmul, QuantConv2d, QuantConvTranspose2d, QuantLinear, QuantMatmul
from ..quantizers import QuantizerSpec, build_rounding
from ..quantizers.spec import check_bits
from ..registry import CONVERTERS, QUANTIZERS, ROUNDINGS, lookup
from .head_folds import let_heads_fold
from .mlp import give_gelu_quantizers

# Predictors of mmdet's heads, two-stage and dense: the last layers of a detector.
LAST_LAYERS = (
    '*.rpn_cls', '*.rpn_reg', '*.fc_cls', '*.fc_reg', '*.conv_logits', '*.retina_cls',
    '*.retina_reg', '*.conv_cls', '*.conv_reg', '*.conv_centerness', '*.atss_cls', '*.atss_reg',
    '*.atss_centerness', '*.gfl_cls', '*.gfl_reg', '*.rtm_cls', '*.rtm_reg', '*.rtm_cls.*',
    '*.rtm_reg.*')
# The module reads its own weights and those of its output projection without calling it.
_FUSED = 'nn.MultiheadAttention computes in one piece; it stays float'
_OVERRIDE_KEYS = ('pattern', 'weight_bits', 'activation_bits')


@dataclass
class QuantConfig:
    """The `quant` entry of a model config.

    Args:
        weight_bits, activation_bits (int): 2 to 8.
        first_last_bits (int | None): bits of the patch embedding and the predictors;
            None treats them like all others.
        rounding (str | dict): 'latent', 'adaround' or 'nearest'.
        weight_symmetric, activation_symmetric (bool): symmetric instead of affine.
        softmax (dict): `QuantizerSpec` of the attention weights, without bits. Of kind 'log2'
            where nothing is said, as PFCR has it; with more than 4 `activation_bits` 'adalog',
            since the steps of 'log2' do not become smaller with bits; `overrides` keep the kind.
        post_gelu (dict | None): the same of inputs that come from a GELU, per tensor; None
            treats them like all others.
        matmul_granularity (str): 'head' or 'tensor', for q, k and v.
        class_tokens (str): 'own' gives class tokens a quantizer of their own in the linear layers
            of blocks, see `TokenQuantizer`; 'shared' treats them like all other tokens.
        include, exclude (list[str]): name patterns (fnmatch) of layers.
        overrides (list[dict]): dict(pattern, weight_bits, activation_bits); the last
            match wins, also over `first_last_bits`.
        reparam (bool): fold channel-wise post-LayerNorm scales into the weights.
        balance_values (bool): scale attention's values against the output projection.
        centre_heads (bool): take the mean out of keys and values.
        rotate_heads (bool): turn queries, keys and values within a head, so that no channel
            is larger than others. See `head_folds`: all three are exact.
        centre_queries (bool): quantize queries about their mean, see `QuantMatmul`.
        integer_zero_point (bool): False leaves zero points unrounded after the fold, as
            published code does; for comparison only.
        move_padding (bool): False leaves the padding of windows at zero after the fold, as
            published code does; for comparison only.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    first_last_bits: int | None = 8
    rounding: object = 'latent'
    weight_symmetric: bool = False
    activation_symmetric: bool = False
    softmax: dict = field(default_factory=dict)
    post_gelu: dict | None = field(default_factory=dict)
    matmul_granularity: str = 'head'
    class_tokens: str = 'shared'
    include: list = field(default_factory=lambda: ['*'])
    exclude: list = field(default_factory=list)
    overrides: list = field(default_factory=list)
    reparam: bool = True
    balance_values: bool = True
    centre_heads: bool = True
    rotate_heads: bool = True
    centre_queries: bool = False
    integer_zero_point: bool = True
    move_padding: bool = True

    def __post_init__(self):
        for key in ('include', 'exclude'):
            if isinstance(getattr(self, key), str):
                setattr(self, key, [getattr(self, key)])
        for key in ('weight_bits', 'activation_bits'):
            check_bits(getattr(self, key), f'quant.{key}')
        self.softmax = {'kind': 'log2' if self.activation_bits <= 4 else 'adalog',
                        'granularity': 'head', **self.softmax}
        for key, value in (('matmul_granularity', self.matmul_granularity),
                           ('softmax.granularity', self.softmax['granularity'])):
            if value not in ('head', 'tensor'):
                raise UsageError(f"quant.{key}={value!r} is not known; choose 'head' or 'tensor'")
        if self.class_tokens not in ('own', 'shared'):
            raise UsageError(f"quant.class_tokens={self.class_tokens!r} is not known; choose 'own' "
                             "or 'shared'")
        if self.first_last_bits is not None:
            check_bits(self.first_last_bits, 'quant.first_last_bits')
        rounding = self.rounding.get('type') if isinstance(self.rounding, dict) else self.rounding
        lookup(ROUNDINGS, rounding, 'quant.rounding')
        try:
            build_rounding(self.rounding)
        except TypeError as error:
            raise UsageError(f'quant.rounding: {error}') from None
        _check_spec(self.softmax, 'quant.softmax')
        if self.post_gelu is not None:
            if not isinstance(self.post_gelu, dict):
                raise UsageError(f'quant.post_gelu={self.post_gelu!r} is no dict, and not None')
            self.post_gelu = {'kind': 'adalog', 'granularity': 'tensor', **self.post_gelu}
            if self.post_gelu['kind'] != 'uniform':
                self.post_gelu = {'shift': 0.17, **self.post_gelu}
            _check_spec(self.post_gelu, 'quant.post_gelu')
            if self.post_gelu['granularity'] != 'tensor':
                raise UsageError("quant.post_gelu.granularity has to be 'tensor'")
        for override in self.overrides:
            if 'pattern' not in override:
                raise UsageError(f'quant.overrides: {override} has no pattern')
            for key in override:
                if key not in _OVERRIDE_KEYS:
                    raise UsageError(
                        f'quant.overrides has the key {key!r}; choose of {_OVERRIDE_KEYS}')
                if key != 'pattern':
                    check_bits(override[key], f"quant.overrides[{override['pattern']}].{key}")

    @classmethod
    def from_dict(cls, cfg):
        """Build from a config dict; an unknown key is one clear error."""
        check_keys(cfg, [f.name for f in fields(cls)], 'quant')
        return cls(**{k: _plain(v) for k, v in cfg.items()})

    def as_dict(self):
        """Plain data, for the manifest."""
        return asdict(self)

    def bits_for(self, name, is_end):
        """(weight bits, activation bits) of the layer `name`."""
        weight, activation = self.weight_bits, self.activation_bits
        if is_end and self.first_last_bits is not None:
            weight = activation = self.first_last_bits
        for override in self.overrides:
            if fnmatchcase(name, override['pattern']):
                weight = override.get('weight_bits', weight)
                activation = override.get('activation_bits', activation)
        return weight, activation

    def skip_reason(self, name):
        """Why the patterns leave the layer `name` out, or None."""
        if not any(fnmatchcase(name, p) for p in self.include):
            return 'no pattern of quant.include matches'
        for pattern in self.exclude:
            if fnmatchcase(name, pattern):
                return f'excluded by {pattern!r}'
        return None

    def matmul_specs(self, name):
        """Specs of (q, k, softmax output, v) of the attention `name`."""
        qk, av = (self.bits_for(f'{name}.{matmul}', False)[1]
                  for matmul in ('matmul_qk', 'matmul_av'))
        operand = dict(
            symmetric=self.activation_symmetric, granularity=self.matmul_granularity)
        return (QuantizerSpec(bits=qk, **operand), QuantizerSpec(bits=qk, **operand),
                QuantizerSpec(bits=av, **self.softmax), QuantizerSpec(bits=av, **operand))


def _check_spec(spec, key):
    """Raise UsageError unless `spec`, a dict, makes a `QuantizerSpec` together with bits."""
    check_keys(spec, [f.name for f in fields(QuantizerSpec) if f.name != 'bits'], key)
    lookup(QUANTIZERS, spec['kind'], f'{key}.kind')
    QuantizerSpec(**spec)


@dataclass
class LayerRecord:
    """One line of the census: a layer is quantized, or skipped for a reason."""

    name: str
    kind: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    skipped_reason: str | None = None


# Float layers whose forward is the plain one; a subclass that computes something
# else must not be swapped.
_LAYERS = (
    (nn.Linear, QuantLinear, (nn.Linear.forward, wrappers.Linear.forward)),
    (nn.Conv2d, QuantConv2d, (nn.Conv2d.forward, wrappers.Conv2d.forward)),
    (nn.ConvTranspose2d, QuantConvTranspose2d,
     (nn.ConvTranspose2d.forward, wrappers.ConvTranspose2d.forward)),
)


def convert(model, quant):
    """Swap layers and attentions of `model` in place.

    Names, Parameters and float behaviour stay; all quantizers start off. A layer that has
    several names is swapped under each, and stays one layer; its first name counts.

    Args:
        model (nn.Module): a float model.
        quant (QuantConfig): what to quantize, and how.

    Returns:
        list[LayerRecord]: the census, one record for every Linear, convolution and
        attention matmul, and for every other module that holds a weight matrix.

    Raises:
        UsageError: a pattern that matches no layer.
    """
    census = []
    ends = _end_layers(model)
    names_of = {}  # heads that share convolutions over levels have them under several names
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    for module, (name, *aliases) in names_of.items():
        converter = CONVERTERS.find(module)
        if converter is not None:
            records = converter(module, name, quant)
            census.extend(records)
            continue
        record = _convert_layer(model, name, aliases, module, quant, name in ends)
        if record is not None:
            census.append(record)
    if quant.post_gelu is not None:
        give_gelu_quantizers(model, quant.post_gelu)
    let_heads_fold(model, quant)
    _check_patterns(quant, [record.name for record in census])
    return census


def quantize_matmuls(attention, name, quant):
    """Give an attention its two matmuls, `matmul_qk` and `matmul_av`, in place.

    Args:
        attention (nn.Module): with `num_heads`; operands are (B, heads, N, C).
        name (str): its full name.
        quant (QuantConfig): where it excludes a matmul, that one is float.

    Returns:
        list[LayerRecord]: census records of both.
    """
    q, k, softmax, v = quant.matmul_specs(name)
    records = []
    for child, left, right in (('matmul_qk', q, k), ('matmul_av', softmax, v)):
        reason = quant.skip_reason(f'{name}.{child}')
        matmul = Matmul() if reason else QuantMatmul(left, right, attention.num_heads)
        setattr(attention, child, matmul)
        records.append(LayerRecord(
            f'{name}.{child}', 'Matmul', None, None if reason else right.bits, reason))
    return records


def skipped_matmuls(attention, name):
    """Census records of both products of an attention that computes in a way of its own."""
    reason = f'{type(attention).__name__} has a forward of its own'
    return [LayerRecord(f'{name}.{child}', 'Matmul', skipped_reason=reason)
            for child in ('matmul_qk', 'matmul_av')]


def _convert_layer(model, name, aliases, module, quant, is_end):
    kind = type(module).__name__
    if isinstance(module, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)):
        return LayerRecord(name, kind, skipped_reason=_FUSED)
    reason = quant.skip_reason(name)
    for float_type, quant_type, plain_forwards in _LAYERS:
        if not isinstance(module, float_type):
            continue
        if reason is None and type(module).forward not in plain_forwards:
            reason = f'{kind} has a forward of its own'
        if reason is not None:
            return LayerRecord(name, kind, skipped_reason=reason)
        weight_bits, activation_bits = quant.bits_for(name, is_end)
        layer = quant_type.from_float(
            module, weight_bits, activation_bits, quant.rounding, quant.weight_symmetric,
            quant.activation_symmetric)
        inputs = layer.input_quantizer
        inputs.spec = replace(inputs.spec, integer_zero_point=quant.integer_zero_point)
        for path in (name, *aliases):
            parent, _, child = path.rpartition('.')
            setattr(model.get_submodule(parent), child, layer)
        return LayerRecord(name, float_type.__name__, weight_bits, activation_bits)
    weights = [p for p in module._parameters.values() if p is not None and p.dim() >= 2]
    if weights and not _holds_table(module):
        return LayerRecord(name, kind, skipped_reason=f'no quantized module for {kind}')
    return None


def _holds_table(module):
    """Position tables and embeddings are looked up and added, never multiplied."""
    names = [n for n, p in module._parameters.items() if p is not None and p.dim() >= 2]
    return isinstance(module, nn.Embedding) or all(
        'pos' in n or 'token' in n or 'bias_table' in n for n in names)


def _end_layers(model):
    """Names of the first convolution and of the predictors."""
    first = next((n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)
    last = {n for n, _ in model.named_modules() if any(fnmatchcase(n, p) for p in LAST_LAYERS)}
    return last | {first, *getattr(model, 'last_layers', ())}


def _check_patterns(quant, names):
    patterns = [('include', p) for p in quant.include] + [('exclude', p) for p in quant.exclude]
    patterns += [('overrides', o['pattern']) for o in quant.overrides]
    for key, pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f'quant.{key}: the pattern {pattern!r} matches no layer; layers are named like '
                f'{names[0]!r}' if names else f'quant.{key}: the model has no layers')


def _plain(value):
    """Config containers as plain dicts and lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
