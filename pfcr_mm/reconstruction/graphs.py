"""Steps as CUDA graphs: launched at once, where Python would launch hundreds of small kernels."""
from collections import Counter
from contextlib import contextmanager

import torch

from ..models.chain import State
from .feed import side_streams

BEFORE = 3  # steps of a shape that are made one by one, before it is worth a graph


class StepGraphs:
    """Computes losses and gradients; shapes of batches that come again are replayed as graphs.

    A graph does the same operations on the same numbers. Where a step cannot be recorded, since
    it looks at numbers on the way, all are made one by one.

    Args:
        compute (Callable): (State, target) -> loss, a scalar; leaves gradients in parameters,
            which have none before. Random numbers must not enter.
        parameters (list[Parameter]): all of them.
    """

    def __init__(self, compute, parameters):
        self.compute, self.parameters = compute, parameters
        self.seen, self.graphs, self.pool = Counter(), {}, None
        self.possible = True

    def __call__(self, state, target):
        key = state.shapes, state.meta, tuple(t.shape for t in target)
        if key in self.graphs:
            return self.graphs[key].replay(state, target)
        self.seen[key] += 1
        if not self.possible or self.seen[key] < BEFORE:
            return self.compute(state, target)
        if self.seen[key] == BEFORE:
            return self._probe(state, target)
        try:
            graph = _Graph(self.compute, self.parameters, state, target, self.pool)
        except RuntimeError:  # out of memory, too: a graph keeps what it works on
            self.possible = False
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            for parameter in self.parameters:
                parameter.grad = None
            return self.compute(state, target)
        self.graphs[key], self.pool = graph, graph.graph.pool()
        return graph.replay(state, target)

    def _probe(self, state, target):
        """A step that tells whether it could be a graph: nothing in it waits for the GPU."""
        try:
            with _waiting_is_an_error():
                return self.compute(state, target)
        except RuntimeError as error:
            if 'synchroniz' not in str(error):
                raise
        self.possible = False
        for parameter in self.parameters:
            parameter.grad = None
        return self.compute(state, target)


class _Graph:
    """One step for one shape; its inputs, gradients and loss lie where they are for good."""

    def __init__(self, compute, parameters, state, target, pool):
        self.inputs = tuple(t.clone() for t in state.tensors + tuple(target))
        tensors = self.inputs[:len(state.tensors)]
        self.graph = torch.cuda.CUDAGraph()
        _, stream = side_streams(self.inputs[0].device)
        # others may allocate meanwhile: the next batch is on its way
        with torch.cuda.graph(self.graph, pool, stream, capture_error_mode='thread_local'):
            self.loss = compute(State(tensors, state.meta), self.inputs[len(tensors):])
        self.gradients = [(p, p.grad) for p in parameters]

    def replay(self, state, target):
        for own, given in zip(self.inputs, state.tensors + tuple(target)):
            own.copy_(given)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss


@contextmanager
def _waiting_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
