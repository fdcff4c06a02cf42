"""Views of a unit: the same leaves, with more (or other) outputs to learn from.

A loss may want to see what the layers inside a unit give, or what the float rest of the
chain makes of the unit's output. A view runs the unit and puts these behind its own
outputs, for the quantized and for the float chain alike; targets then are what the float
view gives, and nothing else need know.
"""
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace

from ..models.chain import State
from ..modules import QuantLayer, QuantMatmul

UNIT, LAYERS, FINAL = 'unit', 'layers', 'final'


def layers_of(leaf, kinds=(QuantLayer, QuantMatmul)):
    """Quantized layers below a leaf, by number of the leaf's module and name in it.

    Returns:
        dict[str, nn.Module]: such as {'1.qkv': QuantLinear}; '0' where the leaf's module
        is the layer itself.
    """
    found = {
        f'{number}.{name}'.rstrip('.'): layer
        for number, module in enumerate(leaf.modules)
        for name, layer in module.named_modules() if isinstance(layer, kinds)
    }
    if any(isinstance(layer, QuantMatmul) for layer in found.values()):
        # an attention: in order of execution its projection comes last
        last = [key for key in found if key.endswith('.proj')]
        found = {**{k: v for k, v in found.items() if k not in last}, **{k: found[k] for k in last}}
    return found


class UnitView:
    """Stands in for a chain while one of its units is reconstructed.

    Args:
        chain (Chain): the quantized or the float one.
        unit (Unit): of that chain.
        wants (set[str]): 'layers' for the outputs of the unit's weight layers, 'final' for
            the chain's final outputs, besides the unit's own.
        rest (Chain): the float chain, whose leaves after the unit lead to 'final'.

    A unit that is a single layer has the layer's output for its own, and the layer's
    parameters alone. Outputs of layers have their channels where the chain has its own.
    """

    def __init__(self, chain, unit, wants, rest):
        self.chain, self.unit, self.wants, self.rest = chain, unit, wants, rest
        self.name, self.channel_axis, self.gives = chain.name, chain.channel_axis, chain.gives
        self.prefix_tokens = chain.prefix_tokens
        self.leaves = list(chain.leaves)
        leaves = self.leaves[unit.start:unit.stop]
        self._layers = [layer for leaf in leaves if LAYERS in wants
                        for layer in layers_of(leaf, QuantLayer).values()]
        self.sizes = {}  # outputs of each kind, once run
        if unit.layer:
            layer = layers_of(leaves[0])[unit.layer]
            self._layers = [layer]
            self.leaves[unit.start] = replace(leaves[0], modules=(layer, ))

    @property
    def ends_in_logits(self):
        """Whether the unit's own output is the classifier's."""
        return (self.gives == 'logits' and self.unit.stop == len(self.leaves)
                and not self.unit.layer)

    def run(self, state, start, stop):
        """Run the unit.

        Returns:
            tuple[State, tuple]: the state after it, and side outputs: the unit's own,
            those of its layers, the final ones.
        """
        rows = state.tensors[0].shape[0]
        with tapped(self._layers) as seen:
            state, side = self.chain.run(state, start, stop)
        layers = tuple(
            _by_image(x, rows).movedim(_channels_of(layer), self.channel_axis)
            for layer, outputs in zip(self._layers, seen) for x in outputs)
        if self.unit.layer:
            self.sizes = {UNIT: len(layers)}
            return State((), state.meta), layers
        final = ()
        if FINAL in self.wants:
            final = self.finish(state)
            if self.unit.stop == len(self.leaves) and not final:
                final = side  # a detector's chain ends in maps, and in no state
        self.sizes = {UNIT: len(state.tensors) + len(side), LAYERS: len(layers),
                      FINAL: len(final)}
        return state, side + layers + final

    def finish(self, state):
        """Final outputs of the chain, the rest of it being float."""
        state, side = self.rest.run(state, self.unit.stop)
        return state.tensors + side

    def parts(self, kinds):
        """Slices of the flat outputs, by kind."""
        found, start = {}, 0
        for kind in (UNIT, LAYERS, FINAL):
            stop = start + self.sizes.get(kind, 0)
            if kind in kinds:
                found[kind] = slice(start, stop)
            start = stop
        return found


class PartOf(Sequence):
    """Some of the tensors of each entry of targets, which are read as they are asked for.

    Args:
        targets (Sequence[tuple[Tensor]]): an entry an image.
        part (slice): of each entry.
    """

    def __init__(self, targets, part):
        self.targets, self.part = targets, part

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.targets[index][self.part]


def view_of(chain, unit, wants, rest):
    """The chain itself where nothing but the unit's outputs is wanted, else a view."""
    wants = set(wants) - {UNIT}
    return UnitView(chain, unit, wants, rest) if wants or unit.layer else chain


@contextmanager
def tapped(layers):
    """Collect what each of `layers` puts out, call by call, within the block."""
    seen = [[] for _ in layers]
    handles = [
        layer.register_forward_hook(lambda _, args, output, calls=calls: calls.append(output))
        for layer, calls in zip(layers, seen)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _by_image(x, rows):
    """(windows * B, ...) as (B, windows, ...), so that images can be told apart."""
    return x if x.shape[0] == rows else x.unflatten(0, (rows, -1))


def _channels_of(layer):
    """The axis of the channels in what a layer puts out, from the end."""
    is_map = isinstance(layer, QuantLayer) and layer.input_axis == 1
    return -3 if is_map else -1  # (B, C, H, W), else (..., C)
