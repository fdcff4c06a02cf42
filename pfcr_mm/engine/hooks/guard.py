"""Keeps quantized and float checkpoints apart in any MMEngine runner."""
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ...errors import UsageError
from ...models.checkpoint import check_manifest, manifest_of
from ...registry import HOOKS


@HOOKS.register_module()
class ManifestGuardHook(Hook):
    """Raises where a stock Runner is about to load the wrong kind of checkpoint.

    MMEngine loads non-strictly: a quantized checkpoint in a float model leaves its
    weights random, a float checkpoint in a quantized model runs in float. QuantRunner
    checks by itself; add this hook to a stock Runner's `custom_hooks`.
    """

    def after_load_checkpoint(self, runner, checkpoint):
        """Compare the checkpoint's manifest with the model."""
        manifest = manifest_of(checkpoint)
        # a distributed wrapper forwards no attributes
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        quantized_model = hasattr(model, 'quant_config')
        if getattr(runner, '_wants', 'quantized') == 'float':
            return  # quantize() looks for itself
        if manifest is not None and not quantized_model:
            raise UsageError(
                'the checkpoint is quantized and the model is float: use the config it was '
                "quantized with (model.type='pfcr_mm.QuantDetector')")
        if manifest is None and quantized_model:
            raise UsageError(
                'the checkpoint holds float weights and the model is quantized: quantize it '
                'first with tools/quant.py')
        if manifest is not None:
            check_manifest(model, manifest)
