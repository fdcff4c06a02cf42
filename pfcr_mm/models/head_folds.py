"""What an attention leaves free, used to make one scale serve all channels of a head.

softmax(q k^T) v, read by the output projection, stays what it is where, in each head,

- keys lose a vector that all of them share: softmax does not see it;
- values lose one, and the projection's bias takes it: weights of attention sum to one;
- channels of the values are divided by r, columns of the projection multiplied;
- queries and keys, or values and columns, are turned by the same orthogonal matrix.

Turned by a Hadamard matrix, a large channel is spread over all (QuaRot, arXiv 2404.00456;
head by head: GLF-Q). The folds are made once, before calibration, from a few images.

Queries cannot lose their mean, which tells keys apart: it becomes the centre about which they
are quantized.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn

from ..modules import QuantLinear, QuantMatmul
from ..registry import QUERY_KEYS, VALUE_PROJECTIONS

# Buffers of an attention that say what was folded; neutral in a float model.
BUFFERS = ('key_mean', 'value_mean', 'value_ratio', 'turned')


@dataclass
class FreeHeads:
    """An attention and what of it may be folded.

    Args:
        attention (nn.Module): with `num_heads`, and the `BUFFERS` that the config asks for.
        qkv (nn.Linear): queries, keys and values, a third of its outputs each, by heads.
        tables (tuple | None): Parameters (L, channels of a head) that queries are multiplied
            with besides keys; None where queries and keys have to stay.
        proj (QuantLinear | None): what reads the values; None where values have to stay.
    """

    attention: nn.Module
    qkv: nn.Module
    tables: tuple | None
    proj: nn.Module | None

    @property
    def centre(self):
        """Tensor | None: (heads, 1, channels) that queries are quantized about."""
        return None if self.tables is None else self.attention.matmul_qk.left_centre

    @property
    def folded(self):
        """dict[str, Tensor]: those of `BUFFERS` that the attention has."""
        return {key: getattr(self.attention, key) for key in BUFFERS
                if hasattr(self.attention, key)}

    def third(self, tensor, which):
        """A view of the rows of q (0), k (1) or v (2)."""
        return tensor.chunk(3)[which]

    def mean_of(self, which, inputs):
        """The mean (C,) of a third, given rows (n, channels) of what `qkv` reads."""
        weight, bias = (None if tensor is None else self.third(tensor, which)
                        for tensor in (self.qkv.weight, self.qkv.bias))
        return nn.functional.linear(inputs.mean(0).to(weight), weight, bias)

    def by_head(self, tensor):
        """A view (heads, channels, ...) of a third."""
        return tensor.unflatten(0, (self.attention.num_heads, -1))


def let_heads_fold(model, quant):
    """Give the attentions of a converted model the buffers that `quant` has a use for."""
    for module in model.modules():
        found = _freedom(module)
        if found is None:
            continue
        width = found.qkv.weight.new_zeros(found.qkv.out_features // 3)
        if quant.centre_heads and found.tables is not None:
            module.register_buffer('key_mean', width.clone())
        if quant.centre_heads and found.proj is not None:
            module.register_buffer('value_mean', width.clone())
        if quant.balance_values and found.proj is not None:
            module.register_buffer('value_ratio', width + 1)
        if quant.rotate_heads:
            module.register_buffer('turned', width.new_zeros(()))
        if quant.centre_queries and found.tables is not None:
            module.matmul_qk.give_centre(len(width) // module.num_heads)


def _freedom(module):
    tables = qkv = proj = None
    find = QUERY_KEYS.find(module)
    if find is not None and QUERY_KEYS.same_forward(module) \
            and isinstance(getattr(module, 'matmul_qk', None), QuantMatmul):
        qkv, tables = find(module) or (None, None)
    find = VALUE_PROJECTIONS.find(module)
    if find is not None and VALUE_PROJECTIONS.same_forward(module):
        values, proj = find(module) or (None, None)
        if isinstance(proj, QuantLinear) and _is_linear(values):
            qkv = values
        else:
            proj = None
    if not _is_linear(qkv) or (tables is None and proj is None):
        return None
    return FreeHeads(module, qkv, tables, proj)


def _is_linear(layer):
    return isinstance(layer, nn.Linear) and type(layer).forward in (
        nn.Linear.forward, QuantLinear.forward)


def free_heads(model):
    """All `FreeHeads` of a model by the name of their attention."""
    found = {name: _freedom(module) for name, module in model.named_modules()}
    return {name: free for name, free in found.items()
            if free is not None and (free.folded or free.centre is not None)}


@torch.no_grad()
def fold_heads(model, rows, attended=None):
    """Fold every attention of a float model, exactly, before calibration; centre its queries.

    Keys lose their mean, values what they are where attention attends (`AttendedValues`): so
    the errors of its weights, relative to them, hurt the least. With d the deviation of a
    channel of attention's output, r = sqrt(d / mean d): the root leaves half of the spread to
    the weight (as SmoothQuant does at alpha = 1/2, arXiv 2211.10438); all of it there costs
    more than it saves.

    Args:
        rows (dict[str, Tensor | None]): a sample (n, channels) of each layer's inputs, by its
            name; what is not there, of a layer that is not quantized or not reached, is not folded
            by.
        attended (dict[str, Tensor] | None): means (C,) of the values, by attention; without
            them values keep theirs.

    Returns:
        dict[str, dict[str, Tensor]]: what was folded, see `BUFFERS`, by attention.
    """
    names = {module: name for name, module in model.named_modules()}
    folds = {}
    for name, free in free_heads(model).items():
        inputs, outputs = (rows.get(names.get(layer)) for layer in (free.qkv, free.proj))
        fold = {key: value.clone() for key, value in free.folded.items()}
        if 'key_mean' in fold and inputs is not None and free.qkv.bias is not None:
            fold['key_mean'] = free.mean_of(1, inputs)
        if outputs is not None:
            if 'value_mean' in fold and name in (attended or {}) and None not in (
                    free.qkv.bias, free.proj.bias):
                fold['value_mean'] = attended[name].to(free.proj.weight)
            size = outputs.std(0)
            if 'value_ratio' in fold and size.mean() > 0:  # nor where it is no number: one row
                fold['value_ratio'] = (size / size.mean()).clamp(min=1e-4).sqrt().to(
                    free.proj.weight)
        if 'turned' in fold:
            fold['turned'] += 1
        _fold(free, fold)
        folds[name] = fold
        if free.centre is not None and inputs is not None:
            mean = free.mean_of(0, inputs) * free.attention.scale
            free.centre.copy_(free.by_head(mean)[:, None])
    return folds


def fold_heads_alike(twin, folds):
    """Fold a float twin, built alike, as `fold_heads` folded its model."""
    for name, free in free_heads(twin).items():
        if name in folds:
            _fold(free, folds[name])


@torch.no_grad()
def _fold(free, fold):
    """Take what is folded back, and fold anew. Sums in double, whatever the device makes faster."""
    now = {key: value.double() for key, value in free.folded.items()}
    new = {key: value.to(free.qkv.weight.device).double() for key, value in fold.items()}
    if now.keys() != new.keys():
        raise ValueError(f'a fold of {list(new)} for buffers {list(now)}')
    size = free.qkv.out_features // 3 // free.attention.num_heads
    turn = hadamard(size).to(free.qkv.weight.device)
    if now.get('turned', 0) > 0:
        _turn(free, turn.T)
    if 'value_ratio' in fold:
        _divide_values(free, 1 / now['value_ratio'])
    for sign, means in ((-1, now), (1, new)):
        _centre(free, sign, means)
    if 'value_ratio' in fold:
        _divide_values(free, new['value_ratio'])
    if new.get('turned', 0) > 0:
        _turn(free, turn)
    for key, value in fold.items():
        getattr(free.attention, key).copy_(value)


def _centre(free, sign, means):
    qkv, proj = free.qkv, free.proj
    if 'key_mean' in means and qkv.bias is not None:
        free.third(qkv.bias, 1).sub_(sign * means['key_mean'])
    if 'value_mean' in means and None not in (qkv.bias, proj.bias):
        free.third(qkv.bias, 2).sub_(sign * means['value_mean'])
        proj.bias.add_(sign * (proj.weight.double() @ means['value_mean']))


def _divide_values(free, ratio):
    free.third(free.qkv.weight, 2).div_(ratio[:, None])
    if free.qkv.bias is not None:
        free.third(free.qkv.bias, 2).div_(ratio)
    free.proj.weight.mul_(ratio)


def _turn(free, turn):
    if free.tables is not None:
        _turn_outputs(free, 0, turn)
        _turn_outputs(free, 1, turn)
        for table in free.tables:
            table.copy_(table.double() @ turn)
    if free.proj is not None:
        _turn_outputs(free, 2, turn)
        columns = free.proj.weight.unflatten(1, (free.attention.num_heads, -1))
        columns.copy_(columns.double() @ turn)


def _turn_outputs(free, which, turn):
    """Turn what a third of qkv gives, head by head: rows x become x @ turn."""
    weight = free.by_head(free.third(free.qkv.weight, which))
    weight.copy_(turn.T @ weight.double())
    if free.qkv.bias is not None:
        bias = free.by_head(free.third(free.qkv.bias, which))
        bias.copy_(bias.double() @ turn)


def hadamard(size):
    """An orthogonal matrix whose entries are alike in size.

    Sylvester's Hadamard matrix where `size` is a power of two; its product with a cosine
    transform (DCT-II) of the odd factor elsewhere.

    Returns:
        Tensor: (size, size), float64.

    Example:
        >>> hadamard(2) * 2**0.5
        tensor([[ 1.,  1.],
                [ 1., -1.]], dtype=torch.float64)
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    place = torch.arange(odd, dtype=torch.float64)
    matrix = torch.cos(math.pi / odd * place[:, None] * (place + 0.5)) * math.sqrt(2 / odd)
    matrix[0] /= math.sqrt(2)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix
