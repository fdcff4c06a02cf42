"""The straight step and ours: the same values and gradients."""
import pytest
import torch

from pfcr_mm.benchmark.cases import build_case
from pfcr_mm.benchmark.reference import straight_twin
from pfcr_mm.models import State
from pfcr_mm.modules import QuantLayer
from pfcr_mm.quantizers import QuantizerSpec, build_quantizer
from pfcr_mm.quantizers.blocks import SIZE
from pfcr_mm.reconstruction import UnitConfig
from pfcr_mm.reconstruction.learned_parameters import LearnedParameters
from pfcr_mm.reconstruction.optimize import unit_modules


def close(got, want, tolerance=2e-4):
    """Equal up to the order of summation."""
    error = (got - want).norm() / want.norm().clamp(min=1e-12)
    assert error < tolerance, f'relative error {error:.2g}'


@pytest.mark.parametrize('rounding', ['latent', 'adaround'])
@pytest.mark.parametrize('kind', ['swin_block', 'vit_block'])
def test_a_unit_has_the_same_output_and_gradients(kind, rounding):
    case = build_case(kind, 'demo', rounding)
    unit, state = case.unit, case.inputs.batch([0, 1], 'cpu')
    found = []
    for model in (case.model, straight_twin(case.model)):
        chain = case.chain_of(model)
        tensors = tuple(t.clone().requires_grad_() for t in state.tensors)
        learned = LearnedParameters(unit_modules(chain, unit), UnitConfig(), 'rounding')
        with learned:
            output = chain.run(State(tensors, state.meta), unit.start, unit.stop)[0].tensors[0]
            torch.manual_seed(1)
            (output * torch.randn_like(output)).sum().backward()
            found.append((output.detach(), tensors[0].grad,
                          [p.grad.clone() for p in learned.parameters]))
    ours, straight = found
    close(ours[0], straight[0])
    close(ours[1], straight[1])
    assert len(ours[2]) == len(straight[2]) >= 16
    for got, want in zip(ours[2], straight[2]):
        close(got, want)


@pytest.mark.parametrize('kind', ['uniform', 'log2', 'log_sqrt2', 'adalog'])
@pytest.mark.parametrize('layout', ['plain', 'per head', 'transposed', 'rows'])
def test_large_tensors_in_blocks(kind, layout):
    """Several blocks give what one piece of work gives, whatever the layout."""
    heads, axis = (1, None) if layout == 'plain' else (3, 0 if layout == 'rows' else 1)
    shape = (3, SIZE) if layout == 'rows' else (40, 3, 60, 50)
    quantizer = build_quantizer(QuantizerSpec(kind, 4), heads, axis)
    quantizer.set_scale(torch.tensor([0.06, 0.08, 0.1])[:heads],
                        torch.tensor([2., 0, 5])[:heads] if kind == 'uniform' else None)
    quantizer.enabled = True
    model = torch.nn.ModuleList([quantizer])
    twin, = straight_twin(model)
    x = torch.rand(shape)
    x = x - 0.2 if kind == 'uniform' else x**8
    x.view(-1)[::7] = 0 if kind == 'uniform' else 1e-40  # as masked attention weights are
    weights = torch.randn(shape)
    found = []
    for q in (quantizer, twin):
        leaf = x.clone().requires_grad_()
        q.log_scale.requires_grad_().grad = None
        seen = leaf.mT if layout == 'transposed' else leaf
        out = q(seen)
        (out * (weights.mT if layout == 'transposed' else weights)).sum().backward()
        found.append((out.detach(), leaf.grad, q.log_scale.grad))
    # a number on the border of two steps may fall on either side
    apart = (found[0][0] - found[1][0]).abs() > 1e-5 * found[1][0].abs() + 1e-7
    assert apart.sum() <= 3
    for got, want in zip(found[0][1:], found[1][1:]):
        close(got, want, 2e-3)


def test_the_twin_is_straight():
    case = build_case('vit_block', 'demo')
    before = [p.clone() for p in case.model.parameters()]
    twin = straight_twin(case.model)
    layer = next(m for m in twin.modules() if isinstance(m, QuantLayer))
    names = set()
    node = layer.input_quantizer(torch.rand(4, layer.in_features, requires_grad=True)
                                 if hasattr(layer, 'in_features') else
                                 torch.rand(1, 3, 16, 16, requires_grad=True)).grad_fn
    while node is not None:
        names.add(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    assert {'MulBackward0', 'SubBackward0', 'ClampBackward1', 'AddBackward0'} <= names
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters()))
