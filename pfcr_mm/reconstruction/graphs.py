"""Steps as CUDA graphs: launched at once, where Python would launch hundreds of small kernels."""
from collections import Counter
from contextlib import contextmanager

import torch

from ..errors import FaultError
from ..models.chain import State
from .faults import is_out_of_memory
from .feed import side_streams

BEFORE = 3  # steps of a shape that are made one by one, before it is worth a graph
MOST = 8  # shapes that are recorded; each keeps what it works on


class StepGraphs:
    """Computes losses and gradients; shapes of batches that come again are replayed as graphs.

    A graph does the same operations on the same numbers. Where a step cannot be recorded, since
    it looks at numbers on the way, or has no memory for it, all are made one by one.

    Args:
        compute (Callable): (State, target) -> loss, a scalar; leaves gradients in parameters,
            which have none before. Random numbers must not enter.
        parameters (list[Parameter]): all of them.

    Raises:
        FaultError: recording has broken off, after which nothing can be relied on.
    """

    def __init__(self, compute, parameters):
        self.compute, self.parameters = compute, parameters
        self.seen, self.graphs, self.pool = Counter(), {}, None
        self.obstacle = None  # why nothing is recorded, in words

    def __call__(self, state, target):
        key = state.shapes, state.meta, tuple(t.shape for t in target)
        if key in self.graphs:
            return self.graphs[key].replay(state, target)
        self.seen[key] += 1
        if self.obstacle or self.seen[key] < BEFORE or len(self.graphs) == MOST:
            return self.compute(state, target)
        if self.seen[key] == BEFORE:
            return self._probe(state, target)
        graph = self._record(state, target)
        if graph is None:
            return self._instead('there is no memory for it', state, target)
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
        return self._instead('a step waits for the GPU', state, target)

    def _record(self, state, target):
        try:
            return _Graph(self.compute, self.parameters, state, target, self.pool)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                told = str(error).splitlines()[0]
                raise FaultError(
                    f'a step could not be recorded ({told}): give quantize_cfg.reconstruction.'
                    'cuda_graphs=False; --resume goes on after the last unit') from error
        return None  # out of the handler, or its traceback would keep what did not fit

    def _instead(self, obstacle, state, target):
        """The step, and all after it, one by one."""
        self.obstacle = obstacle
        self.graphs.clear()
        self.pool = None
        torch.cuda.empty_cache()
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
    """In all threads: what is done while batches are made must not wait either."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
