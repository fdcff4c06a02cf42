"""Fixtures of the analysis tests: float twins of the tiny detector, pages of the tiny run."""
import copy

import pytest

from pfcr_mm.modules import set_quantization


@pytest.fixture()
def twin(quantized):
    """The float twin of `quantized`, quantizers off; made before anything is broken."""
    floating = copy.deepcopy(quantized)
    set_quantization(floating, False, False)
    return floating
