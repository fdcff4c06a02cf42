"""Numbers: quantizers, their scale search, and weight rounding. Torch only."""
from .base import Quantizer, build_quantizer, random_mask
from .fused import fused_kernels
from .log import AdaLogQuantizer, Log2Quantizer, LogQuantizer, LogSqrt2Quantizer
from .rounding import AdaRound, LatentRounding, NearestRounding, build_rounding
from .spec import QuantizerSpec
from .tokens import TokenQuantizer
from .uniform import UniformQuantizer

__all__ = [
    'AdaLogQuantizer', 'AdaRound', 'LatentRounding', 'Log2Quantizer', 'LogQuantizer',
    'LogSqrt2Quantizer', 'NearestRounding', 'Quantizer', 'QuantizerSpec', 'TokenQuantizer',
    'UniformQuantizer', 'build_quantizer', 'build_rounding', 'fused_kernels', 'random_mask'
]
