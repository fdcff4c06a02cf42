"""Which passes calibration takes, with which quantizers on, on which images."""
import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmdet.structures import DetDataSample
from tiny_classifiers import build_classifier, pictures

from pfcr_mm.engine import calibrating, settings
from pfcr_mm.engine.augment import with_views
from pfcr_mm.engine.calibrating import Calibrating
from pfcr_mm.models import part_chains
from pfcr_mm.models.chain import State
from pfcr_mm.modules import QuantLayer, quantizers_of
from pfcr_mm.reconstruction import NormRows
from pfcr_mm.reconstruction.capture import Images

IMAGES, HELD_OUT = 20, 4


class Loop(Calibrating):
    """What the mixin needs of a loop, and a record of the passes."""

    def __init__(self, quant=(), **options):
        self.model = build_classifier('vit', weight_bits=4, activation_bits=4, **dict(quant))
        self.teacher = copy.deepcopy(self.model)
        pixels = pictures('vit', IMAGES)
        states = [State((x[None], )) for x in pixels]
        self.calibration = settings.calibration_of(
            dict(dict(images=IMAGES, search_images=IMAGES, method='mse', compensate=0.01,
                      feed_back=True), **options))
        self.learned_on, self.seed, self.device = IMAGES - HELD_OUT, 0, torch.device('cpu')
        self.images = with_views(Images(states, [[DetDataSample()]] * IMAGES, range(IMAGES)),
                                 self.calibration['views'], self.learned_on, 0)
        self.folds, self.notes, self.note = [], [], lambda text: self.notes.append(text)
        self.runner = SimpleNamespace(logger=logging.getLogger('loop'))
        self.passes = []
        for model in (self.model, self.teacher):
            model.predict = lambda x, samples, rescale, model=model: model(x)

    def _show(self, model, *observers, images=None, views=False):
        on = {name.endswith('weight_quantizer'): False for name, _ in quantizers_of(model)}
        for name, quantizer in quantizers_of(model):
            on[name.endswith('weight_quantizer')] |= quantizer.enabled
        for observer in observers:
            seen, begin = [], observer.begin_image
            observer.begin_image = lambda number, seen=seen, begin=begin: (
                seen.append(number), begin(number))
            self.passes.append((type(observer).__name__, on[True], on[False], seen))
        super()._show(model, *observers, images=images, views=views)
        for observer in observers:
            del observer.begin_image
        self.passes = [shown for shown in self.passes if shown[-1]]


def weights(model):
    return {name: module.weight.clone() for name, module in model.named_modules()
            if isinstance(module, QuantLayer)}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_passes_their_quantizers_and_their_images():
    """Weights always float; inputs float first, quantized once scales are theirs."""
    loop = Loop()
    loop.calibrate()
    loop.enter_final_stage(loop.model)
    learned = list(range(IMAGES - HELD_OUT))
    assert loop.passes == [
        ('Observer', False, False, learned[:8]),  # folds of heads
        ('AttendedValues', False, False, learned[:8]),
        ('Observer', False, False, learned),
        ('MomentObserver', False, False, learned),
        ('Observer', False, True, learned),
        ('MomentObserver', False, True, learned)]
    assert all(q.enabled and q.calibrated for _, q in quantizers_of(loop.model))


def test_fits_see_all_views_and_scales_the_images_alone():
    """Views are no images held out, which come behind them."""
    loop = Loop(views=3, search_images=6)
    loop.calibrate()
    loop.enter_final_stage(loop.model)
    learned = IMAGES - HELD_OUT
    first = list(range(6))
    others = [*range(learned, learned + 6), *range(2 * learned, 2 * learned + 6)]
    assert [seen for name, *_, seen in loop.passes if name == 'MomentObserver'] == [
        first, others, first, others]
    assert [seen for name, *_, seen in loop.passes if name == 'Observer'] == [first] * 3


def test_fits_see_four_views_at_most():
    loop, learned = Loop(views=6, search_images=1), IMAGES - HELD_OUT
    loop.calibrate()
    assert [seen for name, *_, seen in loop.passes if name == 'MomentObserver'] == [
        [0], [learned, 2 * learned, 3 * learned]]


def test_the_end_is_reached_once():
    loop = Loop()
    loop.calibrate()
    loop.enter_final_stage(loop.model)
    before, count = weights(loop.model), len(loop.passes)
    assert loop.enter_final_stage(loop.model) == {}
    assert not changed(before, weights(loop.model)) and len(loop.passes) == count


def test_compensate_is_a_switch():
    ones = [Loop(compensate=strength) for strength in (None, 0.01)]
    for loop in ones:
        loop.calibrate()
    plain, fitted = (weights(loop.model) for loop in ones)
    assert changed(plain, fitted) > {'backbone.blocks.0.attn.qkv', 'backbone.blocks.0.mlp.fc1'}
    assert [p[0] for p in ones[0].passes] == ['Observer', 'AttendedValues', 'Observer']


@pytest.mark.parametrize('reparam', [True, False], ids=['folded', 'not folded'])
@pytest.mark.parametrize('compensate', [None, 0.01])
def test_feed_back_is_a_switch(compensate, reparam):
    """Whatever else has been done to the weights."""
    ones = [Loop(dict(reparam=reparam), compensate=compensate, feed_back=on)
            for on in (False, True)]
    for loop in ones:
        loop.calibrate()
        loop.enter_final_stage(loop.model)
    plain, fitted = (weights(loop.model) for loop in ones)
    assert changed(plain, fitted) > {'backbone.blocks.0.attn.qkv', 'backbone.blocks.0.mlp.fc1'}


def test_weights_that_stay_float_are_not_rounded():
    """A stage of POS that learns float weights starts from these."""
    loop = Loop()
    loop.calibrate()
    loop.enter_final_stage(loop.model, rounds=False)
    folded = weights(loop.model)
    other = Loop(feed_back=False)
    other.calibrate()
    other.enter_final_stage(other.model)
    assert not changed(folded, weights(other.model))


def test_what_is_not_fitted_is_said(caplog):
    loop = Loop()
    with caplog.at_level(logging.INFO, 'loop'):
        loop.calibrate()
    assert 'backbone.head: not fitted, 16 rows, fewer than 8 x fan-in' in caplog.text
    assert 'backbone.blocks.0.attn.qkv' not in caplog.text


def test_few_images_fold_heads(monkeypatch):
    monkeypatch.setattr(calibrating, '_HEADS_FOLDED_BY', 3)
    loop = Loop()
    loop.calibrate()
    assert loop.passes[0] == ('Observer', False, False, [0, 1, 2])


def test_fitted_norms_are_a_switch_and_their_teacher_follows():
    loop, pixels = Loop(fit_norms=True, compensate=None), pictures('vit', 3)
    expected = loop.model(pixels)
    loop.calibrate()
    assert loop.passes[-1] == ('NormRows', False, False, list(range(IMAGES - HELD_OUT)))
    torch.testing.assert_close(loop.teacher(pixels), expected, rtol=1e-4, atol=1e-5)
    heads, norms = loop.folds
    assert norms.keys() == {f'backbone.blocks.{i}.{layer}' for i in range(
        len(loop.model.backbone.blocks)) for layer in ('attn.qkv', 'mlp.fc1')}
    for name in norms:
        own, other = (model.get_submodule(name) for model in (loop.model, loop.teacher))
        assert torch.equal(own.bias, other.bias) and (own.input_quantizer.zero_point == 8).all()
    assert loop.enter_final_stage(loop.model).keys() == norms.keys()


def test_norms_are_fitted_to_class_tokens_too():
    """They have a tenth of the weight, and are all there."""
    loop, found = Loop(), {}
    with NormRows(loop.model, part_chains(loop.model)[0], rows=6) as seen:
        for number in (1, 0):
            seen.begin_image(number)
            loop.model(pictures('vit', 2)[number:number + 1])
            found = {**seen.layers}
    for name, (rows, weights) in seen.layers.items():
        assert rows.shape == (2 * 7, loop.model.get_submodule(name).in_features)
        first = [0, 7]
        torch.testing.assert_close(weights[first].sum() / weights.sum(), torch.tensor(0.1))
        assert torch.equal(rows[:7], found[name][1][1])  # image 0, which came second
