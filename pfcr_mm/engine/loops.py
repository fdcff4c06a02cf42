"""`PFCRLoop`: float detector in, quantized detector out.

config -> calibrate -> [POS stage 1 -> reparameterise -> POS stage 2] over the
schedule -> heads -> harden -> evaluate -> save.
"""
import copy

from mmengine.runner import BaseLoop

from .. import parallel
from ..errors import UsageError
from ..files import make_writable
from ..models.checkpoint import save_quantized
from ..modules import QuantLayer, set_quantization
from ..reconstruction import ChainReconstructor, Faults, harden
from ..reconstruction.build_loss import check_shareable, losses_in, parse_loss
from ..reconstruction.cache import FeatureCache
from ..reconstruction.part_streams import PartStreams
from ..reconstruction.units import check_levels
from ..registry import LOOPS
from . import settings
from .augment import retargeted_views, with_views
from .calibrating import Calibrating
from .data import calibration_images, check_dataset, refuse_shared_images
from .measure import measure, test_loop
from .phases import Phase, peak_memory_mb
from .planned import Planned
from .resumable import Resumable
from .signals import StopSignals

CHECKPOINT = 'quantized.pth'


@LOOPS.register_module()
class PFCRLoop(Planned, Calibrating, Resumable, BaseLoop):
    """Progressive Fine-to-Coarse Reconstruction of a detector, part by part.

    Hooks are called at `before_quantize`, `calibrated_model` (a copy of the model as only
    calibration makes it), `after_calibrate`, `after_phase` (calibration or an evaluation is
    done), `before_unit`, `unit_step`, `after_unit`, `on_stop` (a
    signal came), `after_stage` (of POS), `after_quantize`.

    Args:
        runner (QuantRunner): the runner.
        calibration (dict): images, held_out (of these, for accepting units),
            search_images (of these, for scales and, in four views at most, fits; none held
            out),
            method, rounds, rows, dataset,
            views (of each image learned from), cutmix (share of the further ones that
            show a part of another image) and retargeted (share of those that a classifier
            takes for another class; see `with_views`), compensate (strength of the ridge
            by which weights make up for quantized inputs, such as 0.01; None leaves them),
            feed_back (whether rounding makes up for its errors; see `fit_weights`), fit_norms
            (whether channel-wise scales after norms are fitted, see `fit_channels`).
        levels (list[str]): units of the backbone, see `LEVELS`; [] only calibrates.
        head_levels (list[str]): units of neck and heads; [] leaves them calibrated. With
            'detector' the whole detector is a last unit, which learns from predictions.
        traversal (str): 'post_order' or 'level_order'.
        parts (list[str]): patterns of parts to reconstruct.
        pos (dict): see `POSConfig`.
        reconstruction (dict): `UnitConfig` fields, and `per_level` overrides.
        head_reconstruction (dict): overrides of `reconstruction` for neck and heads.
        rois (dict): RoIs an image for the box heads (`proposals`) and the mask
            heads (`detections`).
        cache_dtype (str | None): storage type of cached activations, such as 'float16'.
        cache_memory_mb (float | None): MiB of images and cached activations that are kept in
            memory; what is beyond lies in files. None is no limit.
        cache_dir (str | None): of these files; None is the work dir.
        calibration_dir (str | None): where runs share calibrations. A run begins with one of
            another that calibrated alike, to the same bytes, or leaves its own there.
        evaluate (dict): whether to measure the `float` and the `calibrated` model, and whether
            to measure what is measured with the `val` dataloader too.
        expected (dict | None): float metrics that the checkpoint is known for.
        total_iters (int | None): iterations of all units together; those that the other keys
            give are scaled to it, so that methods compare at equal cost.
        images_at_once (int | None): of a step's batch, computed together at most, gradients
            being summed; None is the whole batch. 1 makes the result the same to the bit for
            any number of processes.
        on_nonfinite (str): where a unit meets NaN or Inf, 'restore' undoes it and goes on,
            'stop' ends the run.
    """

    def __init__(self, runner, calibration=None, levels=('leaf', 'block', 'pair', 'stage',
                                                         'backbone'),
                 head_levels=('leaf', 'chain'), traversal='post_order', parts=('*', ), pos=None,
                 reconstruction=None, head_reconstruction=None, rois=None, cache_dtype=None,
                 cache_memory_mb=None, cache_dir=None, calibration_dir=None, evaluate=None,
                 expected=None, total_iters=None, images_at_once=None, on_nonfinite='restore'):
        self._runner = runner
        self.calibration = settings.calibration_of(calibration)
        self.levels = settings.levels_of(levels)
        self.head_levels = check_levels(head_levels, 'quantize_cfg.head_levels')
        self.traversal = traversal
        self.parts = [parts] if isinstance(parts, str) else list(parts)
        self.pos = settings.pos_of(pos)
        self.reconstruction, self.head_reconstruction = settings.reconstruction_of(
            reconstruction, head_reconstruction, self.pos)
        self.rois = settings.rois_of(rois)
        self.cache = FeatureCache(
            settings.dtype_of(cache_dtype), settings.cache_memory_of(cache_memory_mb),
            settings.folder_of(cache_dir, 'cache_dir') or runner.work_dir)
        self.calibration_dir = settings.folder_of(calibration_dir, 'calibration_dir')
        self.evaluations = settings.evaluate_of(evaluate)
        self.expected = expected
        self.total_iters = settings.total_iters_of(total_iters)
        self.images_at_once = settings.images_at_once_of(images_at_once)
        self.on_nonfinite = settings.on_nonfinite_of(on_nonfinite)
        self.records, self.notes = [], []
        self.metrics, self.all_metrics, self.val_metrics, self.phases = {}, {}, {}, {}
        self.folds = []  # of the model and of its teacher, in turn
        self.stop = StopSignals()  # the runner enters it
        self.init_resume()
        self._boxes = None

    @property
    def model(self):
        """The detector being quantized."""
        return self.runner.model

    @property
    def seed(self):
        return self.runner.seed or 0

    @property
    def device(self):
        return next(self.model.parameters()).device

    # --- the whole job -------------------------------------------------------

    def run(self):
        """Quantize the runner's model.

        Returns:
            dict: metrics by state ('float', 'calibrated', 'quantized').
        """
        self.look_back()
        self.prepare()
        splits = ('test', 'val') if self.evaluations['val'] else ('test', )
        self.test_loops = {split: test_loop(self.runner, split) for split in splits}
        for split, loop in self.test_loops.items():
            refuse_shared_images(self.images, loop.dataloader.dataset, split)
        if not self.begin():
            return self.metrics
        self.runner.call_hook('before_quantize')
        if 'calibrate' not in self.finished:
            self.take_calibration()
        if 'float' not in self.finished:
            if self.evaluations['float']:
                self.measure('float', self.model)
            self._end_phase('float')
        if 'calibrate' not in self.finished:
            with self._phase('calibrate'):
                self.calibrate()
            self._end_phase('calibrate')
            self.leave_calibration()
        if 'calibrated' not in self.finished:
            if self.evaluations['calibrated']:
                calibrated = copy.deepcopy(self.model)
                self.enter_final_stage(calibrated)
                self.measure('calibrated', calibrated)
                self.runner.call_hook('calibrated_model', model=calibrated)
                del calibrated
            self.runner.call_hook('after_calibrate')
            self._end_phase('calibrated')

        for stage in self.stages.values():
            if self.position is None or stage.number >= self.position[0]:
                with self._phase(f'stage {stage.number}'):
                    self.run_stage(stage)

        self.enter_final_stage(self.model)
        harden(self.model)
        self.size_bytes = parallel.from_main(lambda: save_quantized(
            self.model, f'{self.runner.work_dir}/{CHECKPOINT}', self._meta()))
        self.measure('quantized', self.model)
        self.seconds = self.elapsed()
        self.runner.call_hook('after_quantize')
        return self.metrics

    def prepare(self):
        """Everything that can fail for a mistake in config or data, before any work."""
        check_dataset(self.runner.cfg.test_dataloader.dataset, 'test_dataloader')
        if self.evaluations['val']:
            if None in map(self.runner.cfg.get, ('val_dataloader', 'val_evaluator')):
                raise UsageError(
                    'quantize_cfg.evaluate.val is on, the config has no val_dataloader or no '
                    'val_evaluator')
            check_dataset(self.runner.cfg.val_dataloader.dataset, 'val_dataloader')
        self.cache.check()
        if self.calibration_dir is not None:
            make_writable(self.calibration_dir, 'quantize_cfg.calibration_dir')
        self.arrange()
        for (number, _), units in self.plan().items():
            for unit in units:
                for loss in losses_in(self.unit_config(number, unit).loss):
                    check_shareable(parse_loss(loss)[0], loss)
        if self.calibration['retargeted'] and not hasattr(self.model, 'logits'):
            raise UsageError(
                'quantize_cfg.calibration.retargeted is for classifiers: '
                f'{type(self.model).__name__} has no class logits of an image; set it to 0')
        images = calibration_images(
            self.runner.cfg, self.model, self.calibration['images'], self.seed,
            self.calibration['dataset'], self.note, self.cache)
        self.count(parallel.whole(parallel.Shard(
            (tuple(state.shapes[0][-2:]) for state in images.states), images.numbers)))
        self.teacher = copy.deepcopy(self.model)
        views, cutmix, retargeted = map(self.calibration.get, ('views', 'cutmix', 'retargeted'))
        count = retargeted_views(views, retargeted) * self.learned_on
        if count:
            self.runner.logger.info(f'Moving {count} views until the float model takes them for '
                                    'other classes, in a few steps each')
        self.images = with_views(
            images, views, self.learned_on, self.seed, self.cache, cutmix, retargeted, self._logits)
        self.teacher_chains, _ = self.chains_of(self.teacher)

    def _logits(self, inputs):
        """Of the float classifier, on the CPU."""
        return self.teacher.logits(inputs.to(self.device)).cpu()

    # --- phases --------------------------------------------------------------

    def run_stage(self, stage):
        """One stage of POS over all its parts."""
        if stage.final:
            # the teacher too: targets then mean what the model's maps mean
            self._fold(self.enter_final_stage(self.model, stage.quantize_weights))
        set_quantization(self.model, stage.quantize_weights, stage.quantize_activations)
        todo = {part: schedule for part, schedule in self.schedules[stage.number].items()
                if len(schedule) > self.units_done(stage, part)}
        streams = PartStreams(
            (self.model, self.teacher), self.images, list(todo), self._boxes, self.rois, self.seed,
            self.cache, self.images_at_once)
        for part, schedule in todo.items():
            self.reconstruct_part(part, streams, schedule, stage)
        self.runner.call_hook('after_stage')
        if not stage.quantize_weights:  # the scales in force were those of other weights
            for layer in self.model.modules():
                if isinstance(layer, QuantLayer):
                    layer.weight_quantizer.calibrated = False

    def reconstruct_part(self, part, streams, schedule, stage):
        """PFCR on the units of one chain that are not done.

        Its input is taken behind everything quantized before it.
        """
        done = self.units_done(stage, part)
        quantized, floating = streams.into(part)
        self._boxes = streams.boxes
        if parallel.total(len(quantized)) == 0:
            self.note(f'{part}: no calibration image has a box for it; left as calibrated')
            return
        held_out = parallel.total(self.held_out_among(quantized.numbers))
        self._reconstructor = reconstructor = ChainReconstructor(
            self.chains[part], self.teacher_chains[part], quantized, floating, self.device,
            held_out, self.seed, self.cache, self._faults(), self.images_at_once)
        if done:
            reconstructor.follow(self._paths)

        def end_unit(record):
            self._share_notes()
            self.position = [stage.number, part, self.units_done(stage, part) + 1]
            self._end_unit(record)
            self.stop.check()

        def end_step(step, loss):
            self.runner.call_hook('unit_step', step=step, loss=loss)
            self.stop.check()

        with self.stop.deferred():
            reconstructor.run(
                schedule, lambda unit: self.unit_config(stage.number, unit), stage,
                on_unit_start=lambda unit: self.runner.call_hook('before_unit', unit=unit),
                on_unit_end=end_unit, on_step=end_step, first=done)
        self._reconstructor = None

    def measure(self, state, model):
        """Test `model`; what counts goes to metrics[state], and of val to val_metrics[state]."""
        with self._phase(f'evaluate {state}'):
            self.metrics[state], self.all_metrics[state] = measure(
                self.runner, model, self.test_loops['test'])
            if self.evaluations['val']:
                self.val_metrics[state], _ = measure(self.runner, model, self.test_loops['val'])

    # --- helpers -------------------------------------------------------------

    def note(self, text):
        """Say something that belongs into log and report."""
        if text not in self.notes:  # a resumed run comes by the same places
            self.notes.append(text)
        self.runner.logger.warning(text)

    def _share_notes(self):
        """What other processes have to say reaches the one that writes."""
        for text in [text for notes in parallel.gather(self.notes) for text in notes]:
            if text not in self.notes:
                self.note(text)

    def _faults(self):
        names = {module: name for name, module in self.model.named_modules()}

        def tell(text):
            kind = text.partition(' in ')[0]
            if kind != 'out of memory' or not any(n.startswith(kind) for n in self.notes):
                self.note(text)

        return Faults(tell, self.on_nonfinite, names.get)

    def _end_unit(self, record):
        record.peak_memory_mb = peak_memory_mb()
        self.records.append(record)
        self.runner.call_hook('after_unit', record=record)

    def _end_phase(self, name):
        self._share_notes()
        self.finished.append(name)
        self.runner.call_hook('after_phase')

    def _meta(self):
        dataset = self.runner.test_loop.dataloader.dataset
        return dict(dataset_meta=_plain_meta(getattr(dataset, 'metainfo', {})), seed=self.seed)

    def _phase(self, name):
        return Phase(self, name)


def _plain_meta(meta):
    """Dataset metainfo as tuples, lists and strings only."""
    keep = {}
    for key, value in dict(meta).items():
        if key in ('classes', 'palette', 'CLASSES', 'PALETTE'):
            keep[key] = value if isinstance(value, str) else [
                v if isinstance(v, str) else [int(c) for c in v] for v in value]
    return keep
