"""The manifest of a quantized checkpoint: plain data that says what it holds."""
from dataclasses import asdict

from ..modules import quantizers_of
from ..quantizers import TokenQuantizer

FORMAT = 'pfcr_mm.quantized/1'
UNREACHED = 'no calibration data reached it'


def build_manifest(detector):
    """What `detector` is: format, quantization config, census.

    A layer whose input quantizer no calibration data reached says so.

    Returns:
        dict: plain data; loads with `weights_only=True`.
    """
    layers = [asdict(record) for record in detector.census]
    by_name = {layer['name']: layer for layer in layers}
    for name, quantizer in quantizers_of(detector):
        layer = by_name[name.rpartition('.')[0]]
        if not (quantizer.calibrated or isinstance(quantizer, TokenQuantizer)):
            layer['skipped_reason'] = UNREACHED
    return dict(format=FORMAT, quant=detector.quant_config.as_dict(), layers=layers)
