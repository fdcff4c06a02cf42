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


def layer_entries(detector):
    """The manifest's layers and what calibration decided for their class tokens.

    Returns:
        list[dict]: layers of `build_manifest`; those that may quantize class tokens apart have
        a key class_tokens, 'own' where they do so, 'shared' where the layer's own grid has the
        smaller error.
    """
    modules = dict(detector.named_modules())
    layers = build_manifest(detector)['layers']
    for layer in layers:
        quantizer = getattr(modules.get(layer['name']), 'token_quantizer', None)
        if quantizer is not None:
            layer['class_tokens'] = 'own' if quantizer.calibrated else 'shared'
    return layers
