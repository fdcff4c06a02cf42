"""How near a classifier's probabilities stay to the float model's."""
import copy

from mmengine.hooks import Hook

from ... import parallel
from ...registry import HOOKS

_LEAST = 1e-12  # probability; what is less counts as this


@HOOKS.register_module()
class AgreementHook(Hook):
    """Adds 'kl' and 'same' to the metrics of each evaluation of a classifier.

    `kl` is the divergence (nats) of the model's class probabilities from the float model's, mean
    over the images: sum_c p_c log(p_c / q_c), p being the float ones. `same` is the share of
    images for which both name the same class. Both tell models apart on far fewer images than
    accuracies do, whose images mostly are not at stake.

    The float probabilities are those of the evaluation of the float model; images that it has
    not seen in this process are given to the loop's float twin, whose folds change last digits.
    They stay in memory until the run ends: 4 MB for 1000 images of 1000 classes. Outside a
    quantization run nothing is added.
    """

    def __init__(self):
        self.floats = {}  # image path -> logarithms of the float probabilities (classes,)
        self.found = {}  # image path -> (divergence, whether the class is the same)

    def before_test_epoch(self, runner):
        """A new evaluation begins."""
        self.found = {}

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Compare a batch."""
        if not outputs or 'pred_scores' not in outputs[0]:
            return
        loop = getattr(runner, 'quantize_loop', None)
        if getattr(loop, 'open_phase', None) is None:
            return
        scores = _logarithms(outputs)
        if not scores.keys() <= self.floats.keys():
            is_float = loop.open_phase.name == 'evaluate float'
            floats = scores if is_float else _logarithms(
                loop.teacher.test_step(copy.deepcopy(data_batch)))
            self.floats.update(floats)
        for path, own in scores.items():
            known = self.floats[path]
            self.found[path] = (float((known.exp() * (known - own)).sum()),
                                bool(known.argmax() == own.argmax()))

    def after_test_epoch(self, runner, metrics=None):
        """Add the means over all processes' images."""
        found = {path: pair for part in parallel.gather(self.found) for path, pair in part.items()}
        if found and metrics:
            prefix = next(iter(metrics)).rpartition('/')[0]
            for name, values in zip(('kl', 'same'), zip(*found.values())):
                metrics[f'{prefix}/{name}'.lstrip('/')] = sum(values) / len(values)


def _logarithms(samples):
    """Of each sample's class probabilities (classes,), by the image's path."""
    return {sample.img_path: sample.pred_scores.float().cpu().clamp(min=_LEAST).log()
            for sample in samples}
