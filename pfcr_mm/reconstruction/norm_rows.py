"""What channel-wise quantizers after norms are fitted to."""
from ..models.class_tokens import class_token_counts
from ..models.reparam import post_norm_pairs
from .class_tokens import weighted_rows, without_own
from .layer_rows import LayerRows


class NormRows(LayerRows):
    """Gathers weighted rows of what norms give to quantized layers; use as `Observer`.

    Of a layer (rows (n, channels), weights (n,)).

    Args:
        model (nn.Module): a quantized model; quantizers are switched off.
        chains (dict[str, Chain]): of the model; they know of class tokens.
        rows (int): rows a layer gives at most in one call, class tokens not counted.
        seed (int): seed of the sampling.
    """

    def __init__(self, model, chains, rows=32, seed=0):
        super().__init__(model, seed)
        self.rows, self.prefix = rows, class_token_counts(chains)

    def readers(self):
        found = {id(layer) for _, layer, _ in post_norm_pairs(self.model)}
        return {name: layer for name, layer in self.model.named_modules() if id(layer) in found}

    def tensors_of(self, name, layer, x):
        count = self.prefix.get(layer, 0) if layer.token_quantizer is None else 0
        return weighted_rows(
            layer, without_own(layer, x), count, self.generator(name), self.rows)
