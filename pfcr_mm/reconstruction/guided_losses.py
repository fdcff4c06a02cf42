"""Losses that look further than a unit's output: its layers, the final output, curvature."""
import inspect
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .. import parallel
from ..errors import UsageError, check_keys, is_number
from ..models.chain import State
from ..registry import RECONSTRUCTION_LOSSES
from .build_loss import build_loss, check_loss, loss_wants
from .losses import ChannelMSELoss
from .views import FINAL, LAYERS, UNIT, PartOf

_TEMPERATURE = 20.0  # of the logits where curvature is looked at (APHQ-ViT)


@dataclass
class LossContext:
    """The unit that a loss is built for.

    Args:
        view (UnitView): of the float chain.
        outputs (Stream): the float states after the unit.
        device (torch.device): where to compute.
        batch_size (int): images at a time.
        mixed (list[MixedLoss]): that were built in it; see `take_first_values`.
        curvatures (dict): of `APHLoss`, by the boundary where units end: finer and coarser
            units that end together share them.
    """

    view: object
    outputs: object
    device: torch.device
    batch_size: int = 8
    mixed: list = field(default_factory=list)
    curvatures: dict = field(default_factory=dict)

    def batches(self):
        """The float states after the unit, of the images that this process holds."""
        for _, state in self.outputs.batches(self.batch_size, self.device):
            yield state


def head_kl(logits, target, temperature=1.0):
    """Divergence of softmax(logits) from softmax(target), mean over rows."""
    own, wanted = (F.log_softmax(x / temperature, -1) for x in (logits, target))
    return F.kl_div(own, wanted, reduction='batchmean', log_target=True)


class _Guided:
    """What the losses here share: options are checked by `__init__`, its numbers are above 0."""

    wants = (UNIT, )

    @classmethod
    def check(cls, options, key):
        """Raise UsageError for an unknown option, or a bad number."""
        known = dict(list(inspect.signature(cls.__init__).parameters.items())[4:])
        check_keys(options, list(known), key)
        for name, value in options.items():
            if isinstance(known[name].default, float) and not (is_number(value) and value > 0):
                raise UsageError(f'{key}.{name}={value!r} is not a number above 0')
        if 'other' in options:
            check_loss(options['other'], f'{key}.other')
            if loss_wants(options['other']) != {UNIT}:
                raise UsageError(f"{key}.other={options['other']!r} looks further than the unit's "
                                 "output; choose another, such as 'channel_mse'")

    @classmethod
    def from_context(cls, targets, channel_axis, context, options):
        """Build for one unit."""
        return cls(targets, channel_axis, context, **options)


class OrOther(_Guided):
    """A loss of some units; its option and attribute `other` is that of the rest, or None."""

    @property
    def shares_batches(self):
        """Whether processes may share a batch: as the loss in its place, where there is one."""
        return self.other is None or getattr(self.other, 'shares_batches', False)

    @classmethod
    def parts(cls, options):
        """The loss that may take its place."""
        default = inspect.signature(cls.__init__).parameters['other'].default
        return [options.get('other', default)]


@RECONSTRUCTION_LOSSES.register_module(name='head_kl')
class HeadKL(OrOther):
    """KL divergence where the unit ends in a classifier's logits, another loss elsewhere.

    Args:
        temperature (float): of both softmaxes.
        other (str | dict): loss of all other units.
    """

    def __init__(self, targets, channel_axis, context, temperature=1.0, other='channel_mse'):
        self.temperature = temperature
        self.other = None
        if not context.view.ends_in_logits:
            self.other = build_loss(other, targets, channel_axis, context)

    def __call__(self, outputs, targets):
        if self.other is not None:
            return self.other(outputs, targets)
        return head_kl(outputs[0], targets[0], self.temperature)


@RECONSTRUCTION_LOSSES.register_module(name='final')
class FinalLoss(_Guided):
    """Global supervision: the unit's output, taken through the float rest of the chain.

    The distance of the chain's final outputs from the float ones: KL divergence of a
    classifier's logits, else mean squared error by channel (GLF-Q; EBGS of MGRQ).

    Args:
        temperature (float): of the softmaxes.
    """

    wants = (FINAL, )
    shares_batches = True

    def __init__(self, targets, channel_axis, context, temperature=1.0):
        if context.view.unit.layer:
            raise UsageError("the loss 'final' is for leaves and coarser units, not for 'layer'")
        self.part = context.view.parts([FINAL])[FINAL]
        self.temperature = temperature
        self.other = None
        if context.view.gives != 'logits':
            self.other = ChannelMSELoss(
                PartOf(targets, self.part), channel_axis, device=context.device)

    def __call__(self, outputs, targets):
        outputs, targets = outputs[self.part], targets[self.part]
        if self.other is not None:
            return self.other(outputs, targets)
        return head_kl(outputs[0], targets[0], self.temperature)


@RECONSTRUCTION_LOSSES.register_module(name='layers')
class LayersLoss(_Guided):
    """Local supervision: every weight layer inside the unit (IBLS of MGRQ).

    The distribution over channels that each layer's output makes: KL of softmaxes, mean
    over positions and layers. Outputs are divided by their spread first (mean over the
    images of all processes), so that one temperature serves all.

    Args:
        temperature (float): of both softmaxes.
    """

    wants = (LAYERS, )
    shares_batches = True

    def __init__(self, targets, channel_axis, context, temperature=1.0):
        parts = context.view.parts([UNIT, LAYERS])
        self.part = parts[UNIT if context.view.unit.layer else LAYERS]
        self.axis, self.temperature = channel_axis, temperature
        spreads = zip(*([x.to(context.device).float().std().cpu() for x in t[self.part]]
                        for t in targets))
        images = parallel.total(len(targets))
        self.spread = [(total / images).clamp(min=1e-6) for total in _summed(
            torch.stack(layer).double().sum() for layer in spreads)]

    def __call__(self, outputs, targets):
        losses = []
        for k, (output, target) in enumerate(zip(outputs[self.part], targets[self.part])):
            self.spread[k] = self.spread[k].to(output)  # once
            scale = self.temperature * self.spread[k]
            rows, wanted = (x.movedim(self.axis, -1).flatten(0, -2) / scale
                            for x in (output, target))
            losses.append(head_kl(rows, wanted))
        return torch.stack(losses).mean()


@RECONSTRUCTION_LOSSES.register_module(name='aph')
class APHLoss(OrOther):
    """Squared error weighted by the average perturbed Hessian (APHQ-ViT, arXiv 2504.02508).

    The weight of an output element is how much the gradient of the final distance changes
    when all elements are moved by a little, up or down by chance, mean over images (the paper
    moves all of them up, which a LayerNorm behind the unit does not see: nothing would change
    but last digits); images of several sizes share one weight a channel. The distance is the KL
    divergence of a classifier's logits, else the squared error of the final outputs, relative to
    their mean square. A unit that ends the chain has nothing behind it and takes `other`.

    Args:
        step (float): the move, relative to the output's root mean square over all images.
        other (str): loss of units at the end, and of side outputs.
    """

    def __init__(self, targets, channel_axis, context, step=1e-3, other='head_kl'):
        view = context.view
        self.other = self.weights = None
        states = context.outputs.states  # another process may have them all
        count = max(parallel.gather(len(states[0].shapes) if states else 0))
        if view.unit.layer or view.unit.stop == len(view.leaves) or count == 0:
            self.other = build_loss(other, targets, channel_axis, context)
            return
        self.count, self.axis = count, channel_axis
        known = context.curvatures.setdefault(view.unit.stop, {})
        way = step, context.batch_size
        if way not in known:
            known[way] = self._curvature(context, step)
        self.weights = known[way]
        self.sides = None
        if max(parallel.gather(len(targets[0]) if targets else 0)) > count:
            self.sides = ChannelMSELoss(
                PartOf(targets, slice(count, None)), channel_axis, device=context.device)

    def __call__(self, outputs, targets):
        if self.other is not None:
            return self.other(outputs, targets)
        losses = [
            ((output - target).square() * weight.to(output)).mean()
            for output, target, weight in zip(outputs, targets, self.weights)
        ]
        loss = torch.stack(losses).mean()
        if self.sides is not None:
            loss = loss + self.sides(outputs[self.count:], targets[self.count:])
        return loss

    def _curvature(self, context, step):
        size, finals, images = self._sizes(context)
        moves = [step * power.sqrt().float().to(context.device) for power in size]
        finals = [power.clamp(min=1e-12).float().to(context.device) for power in finals]
        totals, energy = [0.0] * self.count, [0.0] * self.count
        fixed = len(context.outputs.roll_call().buckets) == 1
        for state in context.batches():
            with torch.no_grad():
                wanted = context.view.finish(state)
            found = [abs(up - down) for up, down in zip(
                *(self._gradient(context.view, state, wanted, finals, [
                    sign * move * random_signs(x) for move, x in zip(moves, state.tensors)])
                  for sign in (1, -1)))]
            for i, (change, x) in enumerate(zip(found, state.tensors)):
                if not fixed:  # all positions alike
                    axes = [a for a in range(1, x.dim()) if a != self.axis % x.dim()]
                    change, x = (v.mean(axes, keepdim=True) for v in (change, x.square()))
                else:
                    x = x.square()
                totals[i] = totals[i] + change.sum(0, keepdim=True, dtype=torch.float64)
                energy[i] = energy[i] + (x * change).mean((*range(1, x.dim()), )).double().sum()
        # of a target that is all missed the loss is one
        return [(total / (power / images).clamp(min=1e-20) / images).float().to(context.device)
                for total, power in zip(_summed(totals), _summed(energy))]

    @torch.no_grad()
    def _sizes(self, context):
        """Mean squares of the unit's outputs and of the final ones, and the number of rows.

        Of all images of all processes, so that it does not matter who has which.
        """
        size, finals, rows = [0.0] * self.count, None, 0
        for state in context.batches():
            rows += state.tensors[0].shape[0]
            size = [known + _row_squares(x) for known, x in zip(size, state.tensors)]
            wanted = [_row_squares(x) for x in context.view.finish(state)]
            finals = wanted if finals is None else [a + b for a, b in zip(finals, wanted)]
        rows = parallel.total(rows)
        return *([power / rows for power in _summed(own or ())] for own in (size, finals)), rows

    @staticmethod
    @torch.enable_grad()
    def _gradient(view, state, wanted, finals, moves):
        """Gradient of the final distance where the unit's output is moved."""
        moved = tuple((t + move).requires_grad_() for t, move in zip(state.tensors, moves))
        found = view.finish(State(moved, state.meta))
        if view.gives == 'logits':
            distance = head_kl(found[0], wanted[0], _TEMPERATURE) * len(found[0])
        else:
            distance = sum(_row_squares(a - b) / power
                           for a, b, power in zip(found, wanted, finals))
        return torch.autograd.grad(distance, moved)


def random_signs(x):
    """1 or -1 for each element of a row of x (R, ...), the same for all rows and runs."""
    signs = torch.randint(2, x.shape[1:], generator=torch.Generator().manual_seed(0))
    return (2 * signs - 1).to(x)


def _row_squares(x):
    """Mean square of each row (an image, or a region of one), summed over rows in double."""
    return x.square().flatten(1).mean(1).double().sum()


def _summed(values):
    """Tensors summed over all processes, by rank; one without images has no tensors."""
    found = [part for part in parallel.gather([v.cpu() for v in values if torch.is_tensor(v)])
             if part]
    return [sum(column) for column in zip(*found)]


@RECONSTRUCTION_LOSSES.register_module(name='mixed')
class MixedLoss:
    """A weighted sum of losses, each divided by its first value.

    That is its value in the batch that is looked at first; of several processes all must
    take it from the same batch, see `take_first_values`.

    Args:
        terms (list[dict]): losses, with a `weight` each (1 where left out).

    Example:
        >>> dict(type='mixed', terms=[dict(type='channel_mse', weight=2), dict(type='final')])
    """

    def __init__(self, terms):
        self.terms = terms  # (loss, weight, slice of the outputs)
        self.first = [None] * len(terms)

    @staticmethod
    def check(options, key):
        """Raise UsageError where a term is none."""
        terms = options.get('terms')
        if set(options) != {'terms'} or not isinstance(terms, (list, tuple)) or not terms:
            raise UsageError(f'{key}: a mixed loss has terms=[dict(type=..., weight=...), ...]')
        for i, term in enumerate(terms):
            if not isinstance(term, dict):
                raise UsageError(f'{key}.terms.{i}={term!r} is no dict(type=..., weight=...)')
            term = dict(term)
            weight = term.pop('weight', 1.0)
            if not is_number(weight) or weight < 0:
                raise UsageError(
                    f'{key}.terms.{i}.weight={weight!r} is not a number of 0 or more')
            check_loss(term, f'{key}.terms.{i}')

    @property
    def shares_batches(self):
        """Whether processes may share a batch: as its terms."""
        return all(getattr(loss_of, 'shares_batches', False) for loss_of, *_ in self.terms)

    @staticmethod
    def parts(options):
        """Its terms."""
        return [_plain(term) for term in options['terms']]

    @staticmethod
    def wants(options):
        """What all terms look at."""
        return set().union(*({*loss_wants(_plain(term))} for term in options['terms']))

    @classmethod
    def from_context(cls, targets, channel_axis, context, options):
        """Build the terms for one unit. At the end of a chain there is nothing behind it."""
        own = context.view.parts([UNIT])[UNIT]
        terms = []
        for term in options['terms']:
            plain = _plain(term)
            guided = loss_wants(plain) != {UNIT}
            part = slice(None) if guided else own
            seen = targets if guided else PartOf(targets, own)
            terms.append((build_loss(plain, seen, channel_axis, context),
                          term.get('weight', 1.0), part))
        made = cls(terms)
        context.mixed.append(made)
        return made

    def __call__(self, outputs, targets):
        total = 0.0
        for i, (loss_of, weight, part) in enumerate(self.terms):
            loss = loss_of(outputs[part], targets[part])
            if self.first[i] is None:
                self.first[i] = loss.detach().clamp(min=1e-12)
            total = total + weight * loss / self.first[i]
        return total


def _plain(term):
    return {key: value for key, value in dict(term).items() if key != 'weight'}


@RECONSTRUCTION_LOSSES.register_module(name='mse_final')
class MSEAndFinal(MixedLoss):
    """Squared error by channel and global supervision, two to one (the shares of GLF-Q)."""

    TERMS = (dict(type='channel_mse', weight=2.0), dict(type='final'))

    @staticmethod
    def check(options, key):
        """It takes no options."""
        for name in options:
            raise UsageError(f"{key}.{name} is not a known key; 'mse_final' takes none")

    @classmethod
    def parts(cls, options):
        """Both terms."""
        return MixedLoss.parts(dict(terms=cls.TERMS))

    @classmethod
    def wants(cls, options):
        """What both terms look at."""
        return MixedLoss.wants(dict(terms=cls.TERMS))

    @classmethod
    def from_context(cls, targets, channel_axis, context, options):
        """Build both terms for one unit."""
        return super().from_context(targets, channel_axis, context, dict(terms=cls.TERMS))
