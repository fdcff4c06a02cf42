"""Class tokens in calibration: rows that count as more than one in hundreds; own quantizers."""
import torch

from .layer_rows import LayerRows

PREFIX_SHARE = 0.1  # of class tokens in all rows, whatever the number of patches


def weighted_rows(layer, x, count, generator, limit):
    """All class tokens of a layer's input and a random sample of its other rows.

    Args:
        layer (QuantLayer): that reads it.
        x (Tensor): the input; class tokens are told apart in sequences (B, N, C) alone.
        count (int): class tokens, first along axis 1.
        generator (torch.Generator): draws.
        limit (int): other rows at most.

    Returns:
        tuple[Tensor, Tensor]: rows (n, fan_in), class tokens first, and how often each counts
        (n,).
    """
    count = count if x.dim() == 3 else 0
    rows = layer.input_rows(x[:, count:] if count else x, generator, limit)
    weights = torch.ones_like(rows[:, 0])
    if count:
        first = x[:, :count].flatten(0, 1)
        weight = PREFIX_SHARE / (1 - PREFIX_SHARE) * len(rows) / len(first)
        rows = torch.cat([first, rows])
        weights = torch.cat([torch.full_like(first[:, 0], weight), weights])
    return rows, weights


def without_own(layer, x):
    """A layer's input (B, N, C) without the tokens that have a quantizer of their own."""
    own = layer.token_quantizer
    return x if own is None or x.dim() != 3 else x[:, own.tokens:]


class TokenRows(LayerRows):
    """Gathers class tokens for the quantizers of their own; use as `Observer`.

    Of a layer (tokens (n, tokens, C), ).
    """

    def readers(self):
        return layers_with_own(self.model)

    def tensors_of(self, name, layer, x):
        return (x[:, :layer.token_quantizer.tokens], ) if x.dim() == 3 else ()


def layers_with_own(model):
    """Layers whose first tokens may have a quantizer of their own, by name."""
    return {name: module for name, module in model.named_modules()
            if getattr(module, 'token_quantizer', None) is not None}


@torch.no_grad()
def calibrate_tokens(model, seen):
    """Set the quantizers of class tokens, where they serve these better than the layer's own.

    That is where the layer's output has the smaller squared error; elsewhere (behind a GELU a
    logarithmic grid may do better) they stay without scales, and class tokens are quantized like
    all others.

    Args:
        model (nn.Module): whose input quantizers are calibrated.
        seen (dict[str, tuple[Tensor]]): class tokens by layer, see `TokenRows`.
    """
    for name, layer in layers_with_own(model).items():
        own, shared = layer.token_quantizer, layer.input_quantizer
        if seen.get(name) is None or not shared.calibrated:
            continue
        (tokens, ), weight = seen[name], layer.weight_rows()
        tokens = tokens.to(layer.weight)
        error = (shared.fake_quantize(tokens) - tokens) @ weight.t()
        own.calibrated = bool(
            own.fit(tokens, weight, layer.bias, layer.channel_widths()).sum()
            < error.square().mean((0, 2)).sum())
