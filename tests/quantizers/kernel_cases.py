"""Calls of quantizers in all layouts that models have them in, for tests of kernels."""
import torch

from pfcr_mm.quantizers import functional as F

HEADS, TOKENS, WIDTH = 3, 21, 16


def qkv(number):
    """(2, heads, tokens, width) in the layout that attention has it in: rows with gaps."""
    x = torch.randn(2, TOKENS, 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(number))
    return x.permute(2, 0, 3, 1, 4)[number]


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


ONE, BY_HEAD = torch.tensor([0.21]), torch.tensor([0.2, 0.3, 0.4]).view(1, HEADS, 1, 1)
STEPS = torch.tensor([1.7])
UNIFORM, LOG = F.UniformFakeQuantize.apply, F.LogFakeQuantize.apply
CASES = dict(
    plain=(UNIFORM, normal(40, 12), ONE, torch.tensor([5.]), 0, 15),
    queries=(UNIFORM, qkv(0), BY_HEAD, BY_HEAD.new_full(BY_HEAD.shape, 7), 0, 15),
    keys=(UNIFORM, qkv(1).mT, BY_HEAD, BY_HEAD.new_full(BY_HEAD.shape, 7), 0, 15),
    weight=(UNIFORM, normal(12, 8), normal(12, 1).abs() / 3 + 0.1, torch.zeros(12, 1), -8, 7),
    channels_last=(UNIFORM, normal(2, 8, 6, 5).to(memory_format=torch.channels_last), ONE,
                   torch.tensor([5.]), 0, 15),
    softmax=(LOG, (4 * normal(2, HEADS, 9, 9)).softmax(-1), BY_HEAD * 3, 4, 1, True),
    gelu=(LOG, torch.nn.functional.gelu(2 * normal(40, 24)), torch.tensor([2.5]), 4, STEPS, False,
          0.17),
    gelu_with_zero=(LOG, torch.nn.functional.gelu(2 * normal(40, 24)), torch.tensor([2.5]), 4,
                    STEPS, True, 0.17))


def values_and_gradients(function, x, scale, *rest):
    x, scale = x.detach().requires_grad_(), scale.clone().requires_grad_()
    values = function(x, scale, *rest)
    values.backward(normal(*values.shape).to(values.device))
    return values.detach(), x.grad, scale.grad
