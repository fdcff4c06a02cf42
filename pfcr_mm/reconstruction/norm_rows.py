"""What channel-wise quantizers after norms are fitted to."""
import torch

from .. import parallel
from ..models.class_tokens import class_token_counts
from ..models.reparam import post_norm_pairs
from ..modules import set_quantization
from .class_tokens import weighted_rows, without_own
from .noise import PerImage


class NormRows(PerImage):
    """Gathers weighted rows of what norms give to quantized layers; use as `Observer`.

    Args:
        model (nn.Module): a quantized model; quantizers are switched off.
        chains (dict[str, Chain]): of the model; they know of class tokens.
        rows (int): rows a layer gives at most in one call, class tokens not counted.
        seed (int): seed of the sampling.
    """

    def __init__(self, model, chains, rows=32, seed=0):
        self.model, self.rows, self.prefix = model, rows, class_token_counts(chains)
        super().__init__(seed)
        self.layers = {}  # layer name -> (rows (n, channels), weights (n,)), in the end

    def __enter__(self):
        set_quantization(self.model, False, False)
        readers = {id(layer) for _, layer, _ in post_norm_pairs(self.model)}
        self._handles = [
            layer.register_forward_pre_hook(self._see(name))
            for name, layer in self.model.named_modules() if id(layer) in readers]
        return self

    def __exit__(self, error, *_):
        for handle in self._handles:
            handle.remove()
        if error is None:
            self.layers = {name: self._settled(found) for name, found in self.layers.items()}

    def _see(self, name):
        found = self.layers[name] = []  # (image, rows, weights)

        def hook(layer, args):
            if args[0].numel():
                own = layer.token_quantizer
                rows, weights = weighted_rows(
                    layer, without_own(layer, args[0].detach()),
                    0 if own else self.prefix.get(layer, 0), self.generator(name), self.rows)
                found.append((self._image, rows.float().cpu(), weights.float().cpu()))

        return hook

    @staticmethod
    def _settled(found):
        """Those of all processes, in the order of images; None where there are none."""
        found = sorted((one for part in parallel.gather(found) for one in part),
                       key=lambda one: one[0])
        return tuple(map(torch.cat, list(zip(*found))[1:])) if found else None
