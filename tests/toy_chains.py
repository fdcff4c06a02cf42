"""A small residual network with its chain."""
import copy

import torch
from torch import nn

from pfcr_mm.models import Chain, Leaf, QuantConfig, State, convert
from pfcr_mm.modules import set_quantization
from pfcr_mm.reconstruction import calibrate, observe
from pfcr_mm.reconstruction.capture import Stream


class Branch(nn.Module):
    """x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Toy(nn.Module):
    """Two stages of two blocks, each an 'attention' and an 'MLP' branch."""

    def __init__(self, width=12, branches=8):
        super().__init__()
        self.branches = nn.ModuleList(Branch(width) for _ in range(branches))

    def forward(self, x):
        for branch in self.branches:
            x = branch(x)
        return x


def chain_of(model, sides=()):
    """Leaves A1 M1 A2 M2 ... : a block is two leaves, a stage two blocks.

    Leaves numbered in `sides` give half of what they put out as a side output.
    """

    def run(number, branch):
        def forward(state):
            x = branch(state.tensors[0])
            return State((x, ), state.meta), (x / 2, ) if number in sides else ()

        return forward

    return Chain('backbone', [
        Leaf(f'stages.{i // 4}.blocks.{i // 2 % 2}.{"attn" if i % 2 == 0 else "ffn"}',
             run(i, branch), (branch, ), block=i // 2, stage=i // 4, letter='AM'[i % 2],
             sides=i in sides)
        for i, branch in enumerate(model.branches)
    ], channel_axis=-1)


def toy(rounding='latent', bits=3, images=24, seed=0, branches=8):
    """(quantized model, float model, list of inputs (1, tokens, width))."""
    torch.manual_seed(seed)
    model = Toy(branches=branches).requires_grad_(False).eval()
    for branch in model.branches:
        branch.fc2.weight.mul_(3)
    teacher = copy.deepcopy(model)
    inputs = [torch.randn(1, 24 if i % 4 else 16, 12) for i in range(images)]
    convert(model, QuantConfig(weight_bits=bits, activation_bits=bits, rounding=rounding))
    with observe(model) as seen:
        for x in inputs:
            model(x)
    calibrate(model, seen, 'mse')
    set_quantization(model, True, True)
    return model, teacher, inputs


def stream(inputs):
    """One state an image, its number of tokens as meta."""
    return Stream([State((x, ), x.shape[1]) for x in inputs])


def learned_state(model):
    """All parameters, AdaRound's included."""
    return {k: v.detach().clone() for k, v in model.named_parameters()}
