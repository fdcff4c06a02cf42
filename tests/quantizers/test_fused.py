"""Fused kernels give what eager ones give, whatever the layout."""
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import CASES, LOG, ONE, STEPS, UNIFORM, normal, values_and_gradients
from marks import needs_compiler

from pfcr_mm.errors import UsageError
from pfcr_mm.quantizers import functional as F
from pfcr_mm.quantizers import fused, fused_kernels, native

pytestmark = needs_compiler


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients(name):
    want = values_and_gradients(*CASES[name])
    with fused_kernels():
        got = values_and_gradients(*CASES[name])
    assert F.kernels is native
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert 0 < (got[1] == 0).float().mean() < 1  # clipped values are among them


@pytest.mark.parametrize('name', ['keys', 'gelu'])
def test_what_is_dropped_stays_as_it_is(name):
    function, x, *rest = CASES[name]
    keep = (normal(*x.shape) < 0).to(torch.uint8)
    want = values_and_gradients(function, x, *rest, keep)
    with fused_kernels():
        got = values_and_gradients(function, x, *rest, keep)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert torch.equal(got[0][keep == 0], x[keep == 0])


@pytest.mark.parametrize('zero_below', [True, False])
def test_what_is_no_number_stays_none(zero_below):
    x = torch.tensor([0.5, float('nan'), 0.25, 0.0])
    with fused_kernels():
        values, grad_x, _ = values_and_gradients(LOG, x, torch.tensor([1.]), 4, 1, zero_below)
    assert not values[1].isfinite() and grad_x[1].isnan()
    assert values[[0, 2, 3]].isfinite().all()


def test_a_scale_of_fewer_axes():
    case = UNIFORM, normal(40, 12), torch.linspace(0.1, 0.3, 12), torch.zeros(12), -8, 7
    want = values_and_gradients(*case)
    with fused_kernels():
        got = values_and_gradients(*case)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_frozen_scale_has_no_gradient():
    x = normal(40, 12)
    for function, *args in ((F.kernels.uniform_gradients, ONE, torch.tensor([5.]), 0, 15),
                            (F.kernels.log_gradients, ONE, STEPS, 15, 0.17)):
        want = function(x, x, x, *args, of_scale=False)
        with fused_kernels():
            got = getattr(F.kernels, function.__name__)(x, x, x, *args, of_scale=False)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert torch.equal(got[1], torch.zeros_like(ONE))


def test_only_within_the_block_and_where_switched_on():
    with fused_kernels(False):
        assert F.kernels is native
    with pytest.raises(ZeroDivisionError), fused_kernels():
        assert F.kernels is not native
        raise ZeroDivisionError
    assert F.kernels is native


@pytest.mark.parametrize('error', [
    pytest.param(torch._dynamo.exc.TorchDynamoException('no Triton'), id='Triton'),
    pytest.param(torch._dynamo.exc.BackendCompilerFailed('inductor', AssertionError(), None),
                 id='assertion')])
def test_a_failing_compiler_is_one_clear_line(error, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(torch, 'compile', lambda function, **_: fail)
    monkeypatch.setattr(fused, '_compiled', {})
    with pytest.raises(UsageError, match=r'compile=True.*Triton'), fused_kernels():
        values_and_gradients(*CASES['plain'])


def test_no_compiler_is_one_clear_line(tmp_path):
    code = ("from test_fused import *\ntry:\n"
            "    with fused_kernels():\n        values_and_gradients(*CASES['plain'])\n"
            "except UsageError as error:\n    print(error)")
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=os.path.dirname(__file__), text=True,
        capture_output=True, env={**os.environ, 'CXX': 'no-such-compiler',
                                  'PYTHONPATH': os.pathsep.join(filter(None, sys.path)),
                                  'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)})
    told = done.stdout.splitlines()[-1]
    assert 'compile=True' in told and 'C++ compiler' in told, done.stderr
    assert 'no-such-compiler' in told or 'ompiler' in told.partition(')')[0]
