"""Losses that look further than a unit's output, on a toy and on a tiny classifier."""
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_classifiers import build_classifier, pictures
from toy_chains import chain_of, stream, toy

from pfcr_mm.errors import UsageError
from pfcr_mm.models import State, part_chains
from pfcr_mm.modules import set_quantization
from pfcr_mm.reconstruction import (
    ChainReconstructor,
    Stage,
    UnitConfig,
    build_schedule,
    calibrate,
    observe,
    units_of,
)
from pfcr_mm.reconstruction.build_loss import build_loss, check_loss, loss_wants
from pfcr_mm.reconstruction.capture import Stream, advance
from pfcr_mm.reconstruction.guided_losses import (
    APHLoss,
    LossContext,
    MixedLoss,
    head_kl,
    random_signs,
)
from pfcr_mm.reconstruction.views import FINAL, LAYERS, UNIT, UnitView

DEVICE = torch.device('cpu')
MIXED = dict(type='mixed', terms=[dict(type='mse', weight=2), dict(type='final'),
                                  dict(type='layers', weight=0.5)])
ALL = ['mse', 'channel_mse', 'norm_mse', 'aph', 'head_kl', 'final', 'layers', MIXED]


@pytest.fixture(scope='module')
def _classifier():
    model = build_classifier('vit', weight_bits=4, activation_bits=4)
    teacher = copy.deepcopy(model)
    inputs = list(pictures('vit', 12).split(1))
    with observe(model, 256) as seen:
        model(torch.cat(inputs))
    calibrate(model, seen, 'mse')
    set_quantization(model, True, True)
    return model, teacher, inputs


@pytest.fixture()
def classifier(_classifier):
    """(quantized, float, images) of a tiny ViT."""
    model, teacher, inputs = _classifier
    return copy.deepcopy(model), teacher, inputs


def reconstructor(model, teacher, inputs):
    chains = [part_chains(m)[0]['backbone'] for m in (model, teacher)]
    images = Stream([State((x, )) for x in inputs])
    return ChainReconstructor(*chains, images, images, DEVICE, 3, 0)


def context(teacher, inputs, unit_of, wants):
    """(LossContext, targets) of a unit of the float chain."""
    chain = part_chains(teacher)[0]['backbone'] if hasattr(teacher, 'backbone') else (
        chain_of(teacher))
    unit = unit_of(chain)
    start = advance(chain, stream(inputs) if not hasattr(teacher, 'backbone') else Stream(
        [State((x, )) for x in inputs]), 0, unit.start, DEVICE)[0]
    view = UnitView(chain, unit, wants, chain)
    outputs, side = advance(view, start, unit.start, unit.stop, DEVICE)
    targets = [o.tensors + s.tensors for o, s in zip(outputs.states, side.states)]
    return LossContext(view, outputs, DEVICE), targets


def collate(targets):
    return tuple(torch.cat(parts) for parts in zip(*targets))


@pytest.mark.parametrize('loss', ALL, ids=lambda v: v if isinstance(v, str) else 'mixed')
@pytest.mark.parametrize('level, number', [('block', 1), ('leaf', -1), ('layer', 3)])
def test_every_loss_serves_every_unit(loss, level, number, classifier):
    """A block, the head, a single layer."""
    runner = reconstructor(*classifier)
    unit = units_of(runner.chain, level)[number]
    config = UnitConfig(iters=8, batch_size=3, weight_lr=1e-3, scale_lr=1e-2, loss=loss)
    losses = []
    if level == 'layer' and loss in ('final', MIXED):
        with pytest.raises(UsageError, match="not for 'layer'"):
            runner.run([unit], lambda _: config, Stage(1, True, True, ()))
        return
    record, = runner.run([unit], lambda _: config, Stage(1, True, True, ()),
                         on_step=lambda step, value: losses.append(value.item()))
    assert len(losses) == 8 and all(0 <= value < 1e4 for value in losses)
    assert record.loss_before > 0 and record.loss_after < 1.5 * record.loss_before


@pytest.mark.parametrize('loss', ALL, ids=lambda v: v if isinstance(v, str) else 'mixed')
def test_nothing_is_lost_where_nothing_is_missed(loss, classifier):
    _, teacher, inputs = classifier
    found, targets = context(
        teacher, inputs, lambda chain: units_of(chain, 'block')[2], loss_wants(loss))
    loss_of = build_loss(loss, targets, -1, found)
    batch = collate(targets)
    off = tuple(t + 0.3 * t.std() * torch.randn_like(t) for t in batch)
    first = loss_of(off, batch)
    assert first > 0 and loss_of(batch, batch).abs() < 1e-6 * max(1.0, first.item())


def test_a_target_all_missed_costs_one_with_aph(classifier):
    _, teacher, inputs = classifier
    found, targets = context(
        teacher, inputs, lambda chain: units_of(chain, 'block')[0], {UNIT})
    loss_of = build_loss('aph', targets, -1, found)
    batch = collate(targets)
    assert loss_of.weights[0].shape == (1, *batch[0].shape[1:])
    assert loss_of((0 * batch[0], ), batch).item() == pytest.approx(1, rel=0.5)


def test_aph_of_a_linear_rest_is_its_gram_matrix_times_the_move():
    """The rest y = x W with a squared distance: the curvature is 2 W W^T s, s being the signs."""
    torch.manual_seed(1)
    weight = torch.randn(3, 4)
    view = SimpleNamespace(
        unit=SimpleNamespace(layer='', stop=1), leaves=[0, 1], gives='maps',
        finish=lambda state: (state.tensors[0] @ weight, ))
    outputs = Stream([State((torch.randn(1, 5, 3), )) for _ in range(4)])
    targets = [s.tensors for s in outputs.states]
    loss_of = build_loss('aph', targets, -1, LossContext(view, outputs, DEVICE))
    signs = random_signs(targets[0][0])
    assert set(signs.unique().tolist()) == {-1, 1}
    expected = (signs @ weight @ weight.t()).abs()
    found = loss_of.weights[0][0]
    ratio = found / expected
    assert torch.allclose(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-3)


def test_aph_sees_through_a_layer_norm():
    """Moving all channels alike would be nothing to it, and the weights its rounding errors."""
    torch.manual_seed(1)
    weight, tensors = torch.randn(8, 4), [torch.randn(1, 5, 8) for _ in range(4)]
    found = []
    for w in (weight, weight.double()):
        view = SimpleNamespace(
            unit=SimpleNamespace(layer='', stop=1), leaves=[0, 1], gives='maps',
            finish=lambda state, w=w: (F.layer_norm(state.tensors[0].to(w), (8, )) @ w, ))
        outputs = Stream([State((t, )) for t in tensors])
        loss_of = build_loss('aph', [s.tensors for s in outputs.states], -1,
                             LossContext(view, outputs, DEVICE))
        found.append(loss_of.weights[0].double())
    assert found[0].min() > 0
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2 * found[1].mean().item())


def test_units_that_end_together_share_their_curvature(classifier, monkeypatch):
    """An MLP and its block, but no attention; what no later unit needs is dropped."""
    made, weights = [], []
    plain, first = APHLoss._curvature, APHLoss.__init__

    def curvature(self, context, step):
        made.append(context.view.unit.name.removeprefix('backbone.'))
        return plain(self, context, step)

    def init(self, targets, axis, context, **options):
        first(self, targets, axis, context, **options)
        alone = plain(self, replace(context, curvatures={}), 1e-3)
        weights.append(torch.equal(self.weights[0], alone[0]))

    monkeypatch.setattr(APHLoss, '_curvature', curvature)
    monkeypatch.setattr(APHLoss, '__init__', init)
    runner = reconstructor(*classifier)
    schedule = [u for u in build_schedule(runner.chain, ['leaf', 'block'], 'post_order')
                if '.blocks.' in u.name][:6]
    config = UnitConfig(iters=2, batch_size=3, loss='aph')
    kept = []
    runner.run(schedule, lambda _: config, Stage(1, True, True, ()),
               on_unit_end=lambda _: kept.append(sorted(runner.curvatures)))
    assert [u.name.removeprefix('backbone.') for u in schedule] == [
        f'blocks.{i}{end}' for i in (0, 1) for end in ('.attn', '.mlp', '')]
    assert made == ['blocks.0.attn', 'blocks.0.mlp', 'blocks.1.attn', 'blocks.1.mlp']
    assert weights == [True] * 6
    assert kept == [[], [3], [], [], [5], []]


def test_images_of_several_sizes_share_a_weight_a_channel():
    teacher, _, inputs = toy(branches=4)
    set_quantization(teacher, False, False)
    found, targets = context(teacher, inputs, lambda chain: units_of(chain, 'block')[0], {UNIT})
    loss_of = build_loss('aph', targets, -1, found)
    assert len(found.outputs.buckets()) == 2
    assert loss_of.weights[0].shape == (1, 1, 12) and (loss_of.weights[0] > 0).all()


def test_head_kl_by_hand():
    logits, target = torch.tensor([[0., 1.]]), torch.tensor([[1., 0.]])
    p, q = target.softmax(-1), logits.softmax(-1)
    assert torch.allclose(head_kl(logits, target), (p * (p / q).log()).sum())
    p, q = (target / 2).softmax(-1), (logits / 2).softmax(-1)
    assert torch.allclose(head_kl(logits, target, 2), (p * (p / q).log()).sum())


def test_final_is_the_divergence_of_the_logits(classifier):
    model, teacher, inputs = classifier
    found, targets = context(
        teacher, inputs, lambda chain: units_of(chain, 'block')[3], {FINAL})
    batch = collate(targets)
    assert torch.allclose(batch[-1], teacher(torch.cat(inputs)), atol=1e-5)
    off = batch[:-1] + (batch[-1] + torch.randn_like(batch[-1]), )
    loss = build_loss('final', targets, -1, found)(off, batch)
    assert torch.allclose(loss, head_kl(off[-1], batch[-1]))


def test_a_mixed_loss_weighs_what_each_was_at_first(classifier):
    _, teacher, inputs = classifier
    found, targets = context(
        teacher, inputs, lambda chain: units_of(chain, 'block')[1], {LAYERS, FINAL})
    loss_of = build_loss(MIXED, targets, -1, found)
    assert isinstance(loss_of, MixedLoss)
    batch = collate(targets)
    off = tuple(t + torch.randn_like(t) for t in batch)
    assert loss_of(off, batch).item() == pytest.approx(3.5)
    nearer = tuple(t + 0.5 * (o - t) for t, o in zip(batch, off))
    assert 0 < loss_of(nearer, batch).item() < 3.5


@pytest.mark.parametrize('loss, words', [
    ('hinge', "'hinge' is not a known reconstruction loss"),
    (dict(type='mse', floor=1), "'floor' is not a known key"),
    (dict(type='aph', steps=1), 'loss.steps is not a known key'),
    (dict(type='aph', other='hinge'), 'loss.other=.hinge. is not a known'),
    (dict(type='head_kl', other='mse_final'), 'loss.other=.mse_final. looks further'),
    (dict(type='mixed'), 'a mixed loss has terms'),
    (dict(type='mixed', terms=[]), 'a mixed loss has terms'),
    (dict(type='mixed', terms=[dict(type='hinge')]), r'terms.0=.hinge. is not a known'),
    (dict(type='mixed', terms=[dict(type='mse', weight=-1)]), r'terms.0.weight=-1'),
    (dict(type='mixed', terms=[dict(type='mse', weight=float('nan'))]), r'terms.0.weight=nan'),
    (dict(type='mixed', terms=['mse']), "terms.0='mse' is no dict"),
    (dict(type='head_kl', temperature=0), 'loss.temperature=0 is not a number above 0'),
    (dict(type='aph', step='x'), "loss.step='x' is not a number above 0"),
], ids=str)
def test_bad_losses(loss, words):
    with pytest.raises(UsageError, match=words):
        check_loss(loss)
    with pytest.raises(UsageError, match=words):
        UnitConfig.check(dict(loss=loss), 'reconstruction')
