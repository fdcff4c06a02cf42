"""Gradients of a step that is computed in parts, by one process or by several."""
import torch

from .collectives import sum_in_place, world_size


class GradientSum:
    """Sums the gradients of a step's parts over parts and processes.

    Sums are in double and rounded once, at the end: whatever the order of the parts and
    whoever computes them, the same float32 comes out (but for one in hundreds of millions).
    A step that one process computes in one part is left as autograd leaves it.

    Args:
        parameters (list[Parameter]): one or more, on one device, the same in all processes.
        scale (Callable | None): of a loss, what gradients are taken of; the sum of losses
            stays that of the losses themselves.
    """

    def __init__(self, parameters, scale=None):
        self.parameters = parameters
        self.scale = scale or (lambda loss: loss)
        self.sums = None
        self.given = [0] * len(parameters)  # parts that have a gradient
        self.loss = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        for parameter in parameters:
            parameter.grad = None

    def backward(self, loss):
        """Add a part: its loss, a scalar, and the gradients of it."""
        self._take()
        self.scale(loss).backward()
        self.loss += loss.detach()
        if world_size() > 1:  # here, where memory that runs out is met by smaller parts
            self._take()

    def settle(self):
        """Leave the sums over all processes in `parameters`.

        A parameter without a gradient from anyone has none.

        Returns:
            Tensor: the sum of the losses, in double.
        """
        if self.sums is None and world_size() == 1:
            return self.loss
        self._take()
        self._open()
        given = self.given
        if world_size() > 1:
            counts = torch.tensor(given).to(self.loss)
            sum_in_place([self.loss, counts, *self.sums])
            given = counts.tolist()
        for parameter, found, count in zip(self.parameters, self.sums, given):
            parameter.grad = found.to(parameter.dtype) if count else None
        return self.loss

    def _open(self):
        if self.sums is None:
            self.sums = [torch.zeros_like(p, dtype=torch.float64) for p in self.parameters]

    def _take(self):
        """Move what the last part has left in `parameters` to the sums."""
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                self._open()
                self.sums[number] += parameter.grad
                self.given[number] += 1
                parameter.grad = None
