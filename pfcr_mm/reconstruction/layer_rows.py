"""Gathering what some layers of a float model read, image by image."""
import torch

from .. import parallel
from ..modules import set_quantization
from .noise import PerImage


class LayerRows(PerImage):
    """Keeps tensors of the inputs of layers; use as `Observer`. Subclasses say of which, and what.

    Args:
        model (nn.Module): a quantized model; quantizers are switched off.
        seed (int): seed of the sampling.
    """

    def __init__(self, model, seed=0):
        self.model = model
        super().__init__(seed)
        self.layers = {}  # layer name -> tuple of tensors in the end, None where there are none

    def readers(self):
        """The layers, by name."""
        raise NotImplementedError

    def tensors_of(self, name, layer, x):
        """Tensors (n, ...) of a layer's input `x`; none where it says nothing."""
        raise NotImplementedError

    def __enter__(self):
        set_quantization(self.model, False, False)
        self._handles = [layer.register_forward_pre_hook(self._see(name))
                         for name, layer in self.readers().items()]
        return self

    def __exit__(self, error, *_):
        for handle in self._handles:
            handle.remove()
        if error is None:
            self.layers = {name: self._settled(found) for name, found in self.layers.items()}

    def _see(self, name):
        found = self.layers[name] = []  # (image, *tensors)

        def hook(layer, args):
            x = args[0].detach()
            tensors = self.tensors_of(name, layer, x) if x.numel() else ()
            if tensors:
                found.append((self._image, *(t.float().cpu() for t in tensors)))

        return hook

    @staticmethod
    def _settled(found):
        """Those of all processes, in the order of images; None where there are none."""
        found = sorted((one for part in parallel.gather(found) for one in part),
                       key=lambda one: one[0])
        return tuple(map(torch.cat, list(zip(*found))[1:])) if found else None
