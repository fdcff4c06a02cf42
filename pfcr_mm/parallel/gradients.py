"""Gradients of a step that is computed in parts, by one process or by several."""
import torch

from .collectives import sum_in_place, world_size


class GradientSum:
    """Sums the gradients of a step's parts over parts and processes.

    Sums are in double and rounded once, at the end: whatever the order of the parts and
    whoever computes them, the same float32 comes out (but for one in hundreds of millions).
    Where one process computes all at once nothing is added, and nothing is copied.

    Args:
        parameters (list[Parameter]): the same in all processes.
    """

    def __init__(self, parameters):
        self.parameters = parameters
        self.sums = None
        self.loss = torch.zeros((), dtype=torch.float64)
        for parameter in parameters:
            parameter.grad = None

    def backward(self, loss):
        """Add a part: its loss, a scalar, and the gradients of it."""
        self._take()
        loss.backward()
        self.loss = self.loss.to(loss.device) + loss.detach()

    def settle(self, device):
        """Leave the sums over all processes in `parameters`.

        A process without a part counts as zero.

        Returns:
            Tensor: the sum of the losses, in double.
        """
        self.loss = self.loss.to(device)
        if self.sums is not None or world_size() > 1:
            self._take()
            if self.sums is None:
                self.sums = [torch.zeros_like(p, dtype=torch.float64) for p in self.parameters]
            sum_in_place([self.loss, *self.sums])
            for parameter, found in zip(self.parameters, self.sums):
                parameter.grad = found.to(parameter.dtype)
        return self.loss

    def _take(self):
        """Move what the last part has left in `parameters` to the sums."""
        given = [p.grad for p in self.parameters]
        if all(grad is None for grad in given):
            return
        if self.sums is None:
            self.sums = [torch.zeros_like(p, dtype=torch.float64) for p in self.parameters]
        for parameter, found, grad in zip(self.parameters, self.sums, given):
            if grad is not None:
                found += grad
                parameter.grad = None
