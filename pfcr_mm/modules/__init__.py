"""Quantized modules: what replaces a Linear, a convolution or a matmul. Torch only."""
from .base import QuantLayer, quantizers_of, set_quantization, weights_once
from .conv import QuantConv2d, QuantConvTranspose2d
from .linear import QuantLinear
from .matmul import Matmul, QuantMatmul, real_rows

__all__ = [
    'Matmul', 'QuantConv2d', 'QuantConvTranspose2d', 'QuantLayer', 'QuantLinear', 'QuantMatmul',
    'quantizers_of', 'real_rows', 'set_quantization', 'weights_once'
]
