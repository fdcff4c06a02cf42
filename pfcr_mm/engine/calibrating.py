"""What a quantization loop knows of calibration: which passes it takes, in which order."""
import copy
from contextlib import ExitStack

import torch

from .. import parallel
from ..models import part_chains, reparameterise
from ..models.head_folds import fold_heads, free_heads
from ..models.reparam import fit_channels, fold_alike, make_channelwise
from ..modules import QuantLayer, set_quantization
from ..reconstruction import (
    AttendedValues,
    MomentObserver,
    NormRows,
    TokenRows,
    calibrate,
    calibrate_tokens,
    compensate_weights,
    not_fitted,
    observe,
    round_weights,
)
from ..reconstruction.class_tokens import layers_with_own
from ..reconstruction.faults import check_seen

_HEADS_FOLDED_BY = 8  # images; means and sizes of channels need few
_FIT_VIEWS = 4  # of an image, that weights are fitted to; more take their time and change little


class Calibrating:
    """Mixin of `PFCRLoop`: from a float model to one whose every quantizer has a scale.

    `calibrate` is for the model as the first stage of POS has it: float weights, post-norm
    inputs channel-wise. `enter_final_stage` is the rest: folded, weights quantized.
    """

    def calibrate(self):
        """First scales of everything, post-norm activations channel-wise."""
        self._fold_heads()
        if self.model.quant_config.reparam:
            make_channelwise(self.model)
        beside = [TokenRows(self.model)] if layers_with_own(self.model) else []
        self._search_scales(self.model, activations=True, beside=beside)
        for tokens in beside:
            calibrate_tokens(self.model, tokens.layers)
            self._make_equal(self.model)
        if self.calibration['fit_norms']:
            self._fit_norms()
        if self.calibration['compensate'] is not None:
            with self._moment_observer(self.model, activations=False) as seen:
                self._show(self.model, seen)
                self._show(self.model, seen, views=True)
            compensate_weights(self.model, seen, self.calibration['compensate'])
            self._make_equal(self.model)
            for name, reason in not_fitted(self.model, seen).items():
                self.runner.logger.info(f'{name}: not fitted, {reason}')
        for layer in _quantized_layers(self.model):  # scales under float inputs are provisional
            layer.weight_quantizer.calibrated = False

    def enter_final_stage(self, model, rounds=True):
        """Reparameterise, and calibrate the weights that have no valid scales (idempotent).

        Args:
            model (nn.Module): the model, or a copy.
            rounds (bool): whether its weights are quantized from now on.

        Returns:
            dict: see `reparameterise`.
        """
        folds = reparameterise(model)
        if folds or not all(
                layer.weight_quantizer.calibrated for layer in _quantized_layers(model)):
            beside = [self._moment_observer(model, activations=True)
                      ] if rounds and self.calibration['feed_back'] else []
            self._search_scales(model, activations=False, beside=beside)
            for seen in beside:
                round_weights(model, seen)
                self._make_equal(model)
        set_quantization(model, True, True)
        return folds

    # --- passes over the images -----------------------------------------------

    def _fold_heads(self):
        """Make the channels of attention's heads alike, by a few images."""
        if not free_heads(self.model):
            return
        with observe(self.model, self.calibration['rows'], self.seed, products=False) as seen, \
                AttendedValues(self.model) as attended:
            self._show(self.model, seen, attended, images=_HEADS_FOLDED_BY)
        check_seen(seen)
        rows = {name: reservoir.rows for name, reservoir in seen.layers.items()}
        self._fold(fold_heads(self.model, rows, attended.means))

    def _fit_norms(self):
        """Channel-wise scales, and where each channel's grid lies."""
        images = min(self.learned_on, self.calibration['search_images'])
        rows = max(1, self.calibration['rows'] // max(1, images))
        with NormRows(self.model, part_chains(self.model)[0], rows, self.seed) as seen:
            self._show(self.model, seen)
        self._fold(fit_channels(self.model, seen.layers))
        self._make_equal(self.model)

    def _fold(self, folds):
        """Take note of what the model was folded by, and fold its teacher alike."""
        fold_alike(self.teacher, folds)
        self.folds.append(folds)

    @torch.no_grad()
    def _show(self, model, *observers, images=None, views=False):
        """Run `model` on the first calibration images, `search_images` at most, none held out.

        With `views` on their further views instead, see `with_views`; on three of them at most.
        """
        count = min(images or self.learned_on, self.calibration['search_images'])
        for index, number in enumerate(self.images.numbers):
            view, place = divmod(number, self.learned_on)
            if view >= min(self.calibration['views'], _FIT_VIEWS):
                break
            if place >= count or bool(view) is not views:
                continue
            inputs, samples = self.images[index]
            for observer in observers:
                observer.begin_image(number)
            model.predict(inputs.to(self.device), copy.deepcopy(samples), rescale=False)

    def _moment_observer(self, model, activations):
        return MomentObserver(
            model, part_chains(model)[0], activations, self.calibration['rows'] // 4, self.seed)

    def _make_equal(self, model):
        """The same numbers in all processes, to the bit, on any hardware."""
        parallel.copy_from_main([t for t in (*model.parameters(), *model.buffers())
                                 if t.is_floating_point()])

    def _search_scales(self, model, activations, beside=()):
        """Of everything by float activations, or of weights by quantized ones.

        Observers `beside` see the same pass, and further views of the images.
        """
        options = self.calibration
        with ExitStack() as stack:
            for observer in beside:
                stack.enter_context(observer)
            with observe(model, options['rows'], self.seed, activations=not activations,
                         products=options['method'] == 'output') as seen:
                self._show(model, seen, *beside)
            if beside:
                self._show(model, *beside, views=True)
        check_seen(seen)
        unreached = calibrate(model, seen, options['method'], options['rounds'], activations)
        self._make_equal(model)
        for name in unreached if activations else ():
            self.note(f'{name}: no calibration data reached it; its input stays float')


def _quantized_layers(model):
    return [m for m in model.modules() if isinstance(m, QuantLayer)]
