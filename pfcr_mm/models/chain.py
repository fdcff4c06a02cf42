"""Chains: the ordered leaves of one part of a detector.

A coarse reconstruction unit is a slice of a chain, so this is all the method
needs to know of an architecture.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ..errors import UsageError


class State(NamedTuple):
    """What flows between two leaves.

    Args:
        tensors (tuple[Tensor]): batch first.
        meta (Any): hashable facts that travel along, such as (H, W) of a token map.
    """

    tensors: tuple
    meta: Any = None

    @property
    def shapes(self):
        """tuple[torch.Size]: of the tensors."""
        return tuple(t.shape for t in self.tensors)

    @property
    def rows(self):
        """Rows of the first tensor."""
        return self.tensors[0].shape[0]

    def ahead(self):
        """It will be looked at soon: there is nothing to fetch."""


@dataclass
class Leaf:
    """The finest reconstruction unit.

    Args:
        name (str): full name within the chain, as `named_modules` would say it.
        forward (Callable): State -> (State, tuple of side outputs).
        modules (list[nn.Module]): the modules whose parameters the leaf owns.
        block (int | None): number of the block it belongs to, counted over the chain.
        stage (int | None): number of the stage it belongs to.
        group (int | None): number of the group of blocks it belongs to, where the
            architecture repeats a pattern, such as two windowed blocks and a global one.
        letter (str): kind in traversal strings: E(mbedding), A(ttention), M(LP),
            D(ownsampling), N(orm), else L.
        sides (bool): whether it has side outputs.
    """

    name: str
    forward: Callable
    modules: tuple[nn.Module, ...] = field(repr=False, default=())
    block: int | None = None
    stage: int | None = None
    group: int | None = None
    letter: str = 'L'
    sides: bool = False


@dataclass
class Chain:
    """The leaves of one part.

    Args:
        name (str): 'backbone', 'neck', 'rpn_head', 'bbox_head', 'mask_head'.
        leaves (list[Leaf]): in order of execution.
        channel_axis (int): axis of the channels in state tensors and side outputs.
        prefix_tokens (int): class tokens that the result is read from; they come first along
            axis 1 of tensors (B, N, C).
        gives (str): what comes out at the end: 'maps', or 'logits' of a classifier.
        kinds (tuple[str]): of the tensors that come out, where these are a detector's predictions.
    """

    name: str
    leaves: list
    channel_axis: int
    gives: str = 'maps'
    prefix_tokens: int = 0
    kinds: tuple = ()

    def run(self, state, start=0, stop=None):
        """Run leaves [start, stop).

        Returns:
            tuple[State, tuple]: the last state, and the side outputs of all leaves run.

        Raises:
            UsageError: a leaf has side outputs and does not say so.
        """
        side = ()
        for leaf in self.leaves[start:stop]:
            state, outputs = leaf.forward(state)
            if outputs and not leaf.sides:
                raise UsageError(f'the chain of {self.name} has side outputs at its leaf '
                                 f'{leaf.name!r}, which must be made with sides=True')
            side += outputs
        return state, side
