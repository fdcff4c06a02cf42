"""Warns where the float model is not the one the config expects."""
from mmengine.hooks import Hook

from ...registry import HOOKS


@HOOKS.register_module()
class ExpectedMetricsHook(Hook):
    """Compares the measured float metrics with `quantize_cfg.expected`.

    A difference says that checkpoint, data or pipeline are not what they should be,
    so the quantized figures would not be either.

    Args:
        tolerance (float): largest difference that passes, in AP (0 to 1).
    """

    def __init__(self, tolerance=0.002):
        self.tolerance = tolerance

    def after_calibrate(self, runner):
        """Compare, once both figures are there."""
        loop = runner.quantize_loop
        measured = loop.metrics.get('float', {})
        for key, value in (loop.expected or {}).items():
            if key in measured and abs(measured[key] - value) > self.tolerance:
                loop.note(
                    f'float {key} is {measured[key]:.3f}, the config expects {value:.3f}: '
                    'look at checkpoint, data and test pipeline before trusting what follows')
