"""Triton's kernels give what PyTorch's operations give, whatever the layout."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import CASES, ONE, UNIFORM, normal, values_and_gradients
from marks import needs_gpu, needs_triton

from pfcr_mm.quantizers import eager, native


@needs_triton
def test_interpreted_on_a_cpu():
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, folder / 'triton_cases.py'], text=True, capture_output=True,
        env={**os.environ, 'TRITON_INTERPRET': '1',
             'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})
    assert done.returncode == 0, done.stderr
    told = done.stdout.split('\n')
    assert {*CASES, 'several_programs', 'no numbers'} <= set(told)


@needs_triton
def test_what_it_does_not_take_is_left_to_pytorch():
    from pfcr_mm.quantizers import triton_kernels
    x, zero = normal(6, 4), torch.zeros(1)
    assert triton_kernels._takes(x, None, ONE, zero)
    assert not triton_kernels._takes(x.double(), None, ONE, zero)
    assert not triton_kernels._takes(x[:0], None, ONE, zero)
    assert not triton_kernels._takes(x, x > 0, ONE, zero)
    assert not triton_kernels._takes(x, None, torch.ones(6, 4), torch.ones(6, 4))
    got = triton_kernels.uniform_values(x.double(), ONE.double(), zero.double(), -8, 7)
    assert torch.equal(got, eager.uniform_values(x.double(), ONE.double(), zero.double(), -8, 7))


def test_tensors_of_a_cpu_never_come_here():
    assert native._others(normal(3)) is eager


@needs_gpu
@needs_triton
@pytest.mark.parametrize('dropping', [False, True], ids=['all', 'dropped'])
@pytest.mark.parametrize('name', [*CASES, 'several_programs', 'programs_by_head',
                                  'programs_of_powers', 'by_channel', 'one_number', 'log_by_head',
                                  'seven_bits', 'eight_bits', 'eight_bits_by_power'])
def test_on_a_gpu(name, dropping):
    import triton_cases
    triton_cases.check(name, dropping, 'cuda')


@needs_gpu
@needs_triton
def test_no_numbers_on_a_gpu():
    import triton_cases
    triton_cases.check_no_numbers('cuda')
    from pfcr_mm.quantizers import triton_kernels
    assert native._others(normal(3).cuda()) is triton_kernels


@needs_gpu
def test_the_same_to_the_bit_again():
    x, scale = normal(1000, 1000).cuda(), ONE.cuda()
    first, second = (values_and_gradients(UNIFORM, x, scale, scale * 0, -8, 7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
