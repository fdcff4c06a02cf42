"""Units of one layer, and views: what a loss sees behind a unit's output."""
import copy

import pytest
import torch
from toy_chains import chain_of, learned_state, stream, toy

from pfcr_mm.models import QuantConfig, State, convert
from pfcr_mm.models.chain import Chain, Leaf
from pfcr_mm.modules import set_quantization
from pfcr_mm.reconstruction import (
    ChainReconstructor,
    Stage,
    UnitConfig,
    build_schedule,
    traversal_string,
    units_of,
)
from pfcr_mm.reconstruction.learned_parameters import LearnedParameters
from pfcr_mm.reconstruction.units import Unit
from pfcr_mm.reconstruction.views import (
    FINAL,
    LAYERS,
    UNIT,
    UnitView,
    _by_image,
    layers_of,
    view_of,
)

DEVICE = torch.device('cpu')
QUANTIZED = Stage(1, True, True, ('layer', ))
QUICK = UnitConfig(iters=30, batch_size=4, weight_lr=3e-3, adaround_lr=3e-2, scale_lr=1e-2,
                   bias_lr=2e-3)


def toys(rounding='latent', branches=2):
    """(quantized model, its float copy, inputs): both have quantized layers, as in a run."""
    model, _, inputs = toy(rounding, branches=branches)
    teacher = copy.deepcopy(model)
    set_quantization(teacher, False, False)
    return model, teacher, inputs


def run(model, teacher, inputs, levels, config=QUICK, stage=QUANTIZED):
    runner = ChainReconstructor(
        chain_of(model), chain_of(teacher), stream(inputs), stream(inputs), DEVICE, 4, 0)
    return runner, runner.run(build_schedule(runner.chain, levels), lambda unit: config, stage)


def test_layers_come_before_their_leaf():
    model, _, _ = toys()
    chain = chain_of(model)
    assert list(layers_of(chain.leaves[0])) == ['0.fc1', '0.fc2']
    units = build_schedule(chain, ['layer', 'leaf', 'block'])
    assert traversal_string(units) == 'l1 l2 A1 l3 l4 M1 B1'
    assert units[3].name == 'backbone.stages.0.blocks.0.ffn.fc1'
    assert traversal_string(build_schedule(chain, ['layer'])) == 'l1 l2 l3 l4'


@pytest.mark.parametrize('rounding', ['latent', 'adaround'])
def test_a_layer_learns_its_own_output(rounding):
    model, teacher, inputs = toys(rounding)
    before = copy.deepcopy(model)
    runner, records = run(model, teacher, inputs, ['layer'])
    assert [r.level for r in records] == ['layer'] * 4
    assert sum(r.accepted for r in records) >= 3
    assert all(r.loss_after < r.loss_before for r in records if r.accepted)

    def error(candidate):
        layer, expected = (m.branches[1].fc2 for m in (candidate, teacher))
        found = []
        for m, fc in ((candidate, layer), (teacher, expected)):
            fc.register_forward_hook(lambda _, args, y: found.append(y))
            m(inputs[0])
        return (found[0] - found[1]).square().mean()

    with torch.no_grad():
        assert error(model) < error(before)


def test_one_layer_changes_and_nothing_else():
    model, teacher, inputs = toys()
    unit = units_of(chain_of(model), 'layer')[1]
    before = learned_state(model)
    runner = ChainReconstructor(
        chain_of(model), chain_of(teacher), stream(inputs), stream(inputs), DEVICE, 4, 0)
    runner.run([unit], lambda _: QUICK, QUANTIZED)
    changed = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith('branches.0.fc2.') for k in changed)


def test_streams_behind_layers_are_those_of_the_final_model():
    """The next leaf's inputs are not those that a layer's unit saw."""
    model, teacher, inputs = toys(branches=4)
    runner, _ = run(model, teacher, inputs, ['layer'])
    state, _ = chain_of(model).run(State((inputs[0], ), inputs[0].shape[1]), 0, 3)
    assert torch.allclose(runner.quantized.at(3).states[0].tensors[0], state.tensors[0], atol=1e-6)


def test_a_view_gives_layers_and_final_output():
    model, teacher, inputs = toys(branches=4)
    set_quantization(model, False, False)
    unit = units_of(chain_of(model), 'block')[0]
    view = UnitView(chain_of(model), unit, {LAYERS, FINAL}, chain_of(teacher))
    x = inputs[1]  # 24 tokens of 12
    state, rest = view.run(State((x, )), unit.start, unit.stop)
    assert [tuple(t.shape[1:]) for t in rest] == [(24, 24), (24, 12)] * 2 + [(24, 12)]
    assert torch.equal(rest[-1], teacher(x))
    assert torch.equal(rest[0], model.branches[0].fc1(model.branches[0].norm(x)))
    assert view.parts([UNIT, LAYERS, FINAL]) == {
        UNIT: slice(0, 1), LAYERS: slice(1, 5), FINAL: slice(5, 6)}
    assert not any(m._forward_hooks for m in model.modules())


def test_layers_have_their_channels_where_the_chain_has():
    """A patch embedding gives a map, the chain has tokens; a layer in windows gives tokens."""
    patches = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 4, 4), torch.nn.Linear(5, 7))
    convert(patches, QuantConfig(weight_bits=4, activation_bits=4))

    def embed(state):
        tokens = patches[0](state.tensors[0]).flatten(2).transpose(1, 2)
        windows = tokens.reshape(-1, 2, 5)
        return State((patches[1](windows).reshape(len(tokens), -1, 7), )), ()

    chain = Chain('backbone', [Leaf('patch_embed', embed, tuple(patches))], -1)
    x = torch.randn(2, 3, 8, 16)
    unit, = units_of(chain, 'leaf')
    _, (maps, windows) = UnitView(chain, unit, {LAYERS}, chain).run(State((x, )), 0, 1)
    assert torch.equal(maps, patches[0](x).permute(0, 2, 3, 1))
    assert windows.shape == (2, 4, 2, 7)
    layer = units_of(chain, 'layer')[0]
    _, (alone, ) = UnitView(chain, layer, (), chain).run(State((x, )), 0, 1)
    assert torch.equal(alone, maps)
    of_maps = Chain('neck', chain.leaves, 1)
    _, (alone, ) = UnitView(of_maps, layer, (), of_maps).run(State((x, )), 0, 1)
    assert torch.equal(alone, patches[0](x))


def test_at_a_detectors_end_the_maps_are_final():
    """Swin's last leaf is the norm of its last map: nothing is behind it."""
    norm = torch.nn.LayerNorm(4)
    leaf = Leaf(
        'norm3', lambda state: (State(()), (norm(state.tensors[0]), )), (norm, ), sides=True)
    chain = Chain('backbone', [leaf], -1)
    view = UnitView(chain, Unit('backbone.norm3', 'backbone', 'leaf', 'N1', 0, 1), {FINAL}, chain)
    x = torch.randn(2, 5, 4)
    state, side = view.run(State((x, )), 0, 1)
    assert state.tensors == () and [torch.equal(t, norm(x)) for t in side] == [True, True]
    assert view.parts([UNIT, FINAL]) == {UNIT: slice(0, 1), FINAL: slice(1, 2)}


def test_without_wishes_the_chain_is_its_own_view():
    model, teacher, _ = toys()
    chain = chain_of(model)
    assert view_of(chain, units_of(chain, 'block')[0], {UNIT}, chain_of(teacher)) is chain


def test_windows_are_told_apart_by_image():
    """A layer that sees (windows * B, N, C) is one entry an image."""
    x = torch.arange(24.).view(6, 2, 2)  # two images of three windows
    assert torch.equal(_by_image(x, 2)[1], x[3:]) and _by_image(x, 6) is x


# --- what stages learn ----------------------------------------------------------

def test_scales_alone():
    model, _, _ = toys('adaround')
    with LearnedParameters([model], QUICK, 'fixed') as learned:
        assert {id(p) for p in learned.parameters} == {
            id(p) for k, p in model.named_parameters() if k.endswith('input_quantizer.log_scale')}
        assert learned.open == []


def test_roundings_then_scales():
    """BRECQ's second phase keeps the roundings of the first."""
    model, teacher, inputs = toys('adaround')
    set_quantization(model, True, False)
    config = UnitConfig(iters=30, adaround_lr=5e-2, bias_lr=0.0)
    run(model, teacher, inputs, ['block'], config, Stage(1, True, True, ()))
    codes = {k: v >= 0 for k, v in model.named_parameters() if k.endswith('rounding.v')}
    assert codes
    set_quantization(model, True, True)
    run(model, teacher, inputs, ['block'], config, Stage(2, True, True, (), learn='scales'))
    assert all(torch.equal(dict(model.named_parameters())[k] >= 0, v) for k, v in codes.items())


def test_float_inputs_alone():
    """Of a quantized prefix that is nonsense, a unit of float inputs sees nothing."""
    found = []
    for noise in (0.0, 100.0):
        model, teacher, inputs = toys(branches=4)
        runner = ChainReconstructor(
            chain_of(model), chain_of(teacher), stream([x + noise for x in inputs]),
            stream(inputs), DEVICE, 4, 0)
        steps = []
        runner.run([units_of(runner.chain, 'block')[0]],
                   lambda _: UnitConfig(iters=5, input_mix=0.0), QUANTIZED,
                   on_step=lambda step, loss, steps=steps: steps.append(loss.item()))
        found.append(steps)
    assert len(found[0]) == 5 and found[0] == found[1]
