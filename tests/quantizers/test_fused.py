"""Fused kernels give what eager ones give, whatever the layout."""
import os
import subprocess
import sys

import pytest
import torch
from marks import needs_compiler

from pfcr_mm.errors import UsageError
from pfcr_mm.quantizers import eager, fused, fused_kernels
from pfcr_mm.quantizers import functional as F

pytestmark = needs_compiler
HEADS, TOKENS, WIDTH = 3, 21, 16


def qkv(number):
    """(2, heads, tokens, width) in the layout that attention has it in: rows with gaps."""
    x = torch.randn(2, TOKENS, 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(number))
    return x.permute(2, 0, 3, 1, 4)[number]


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


ONE, BY_HEAD = torch.tensor([0.21]), torch.tensor([0.2, 0.3, 0.4]).view(1, HEADS, 1, 1)
STEPS = torch.tensor([1.7])
UNIFORM, LOG = F.UniformFakeQuantize.apply, F.LogFakeQuantize.apply
CASES = dict(
    plain=(UNIFORM, normal(40, 12), ONE, torch.tensor([5.]), 0, 15),
    queries=(UNIFORM, qkv(0), BY_HEAD, BY_HEAD.new_full(BY_HEAD.shape, 7), 0, 15),
    keys=(UNIFORM, qkv(1).mT, BY_HEAD, BY_HEAD.new_full(BY_HEAD.shape, 7), 0, 15),
    weight=(UNIFORM, normal(12, 8), normal(12, 1).abs() / 3 + 0.1, torch.zeros(12, 1), -8, 7),
    channels_last=(UNIFORM, normal(2, 8, 6, 5).to(memory_format=torch.channels_last), ONE,
                   torch.tensor([5.]), 0, 15),
    softmax=(LOG, (4 * normal(2, HEADS, 9, 9)).softmax(-1), BY_HEAD * 3, 4, 1, True),
    gelu=(LOG, torch.nn.functional.gelu(2 * normal(40, 24)), torch.tensor([2.5]), 4, STEPS, False,
          0.17),
    gelu_with_zero=(LOG, torch.nn.functional.gelu(2 * normal(40, 24)), torch.tensor([2.5]), 4,
                    STEPS, True, 0.17))


def values_and_gradients(function, x, scale, *rest):
    x, scale = x.detach().requires_grad_(), scale.clone().requires_grad_()
    values = function(x, scale, *rest)
    values.backward(normal(*values.shape))
    return values.detach(), x.grad, scale.grad


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients(name):
    want = values_and_gradients(*CASES[name])
    with fused_kernels():
        got = values_and_gradients(*CASES[name])
    assert F.kernels is eager
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert 0 < (got[1] == 0).float().mean() < 1  # clipped values are among them


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
        want = function(x, x, x, *args, False)
        with fused_kernels():
            got = getattr(F.kernels, function.__name__)(x, x, x, *args, False)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert torch.equal(got[1], torch.zeros_like(ONE))


def test_only_within_the_block_and_where_switched_on():
    with fused_kernels(False):
        assert F.kernels is eager
    with pytest.raises(ZeroDivisionError), fused_kernels():
        assert F.kernels is not eager
        raise ZeroDivisionError
    assert F.kernels is eager


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
