"""Compare Triton's kernels with PyTorch's operations in all layouts; a script, see below.

    TRITON_INTERPRET=1 python tests/quantizers/triton_cases.py

runs the kernels as they are written, operation by operation, on a CPU: Triton decides that when
it is first imported, so it takes a process of its own. Prints the names of cases.
"""
import torch
from kernel_cases import BY_HEAD, CASES, HEADS, LOG, STEPS, UNIFORM, normal, values_and_gradients

from pfcr_mm.quantizers import eager, triton_kernels
from pfcr_mm.quantizers import functional as F


def with_zeros(x):
    x.view(-1)[::5] = 0
    return x


LINE = 3 * triton_kernels.BLOCK + 7
MORE = dict(
    several_programs=(UNIFORM, normal(3, LINE), torch.tensor([0.21]), torch.tensor([5.]), 0, 15),
    programs_by_head=(UNIFORM, normal(1, HEADS, 70, 70), BY_HEAD, torch.zeros_like(BY_HEAD), -8, 7),
    programs_of_powers=(LOG, normal(3, LINE).softmax(-1) * 99, torch.tensor([0.3]), 8, 2, True),
    by_channel=(UNIFORM, normal(40, 12), torch.linspace(0.1, 0.3, 12), torch.zeros(12), -8, 7),
    seven_bits=(LOG, with_zeros(normal(40, 24).softmax(-1)), torch.tensor([0.3]), 7, 1, True),
    eight_bits=(LOG, with_zeros(normal(40, 24).softmax(-1)), torch.tensor([0.3]), 8, 2, True),
    eight_bits_by_power=(LOG, with_zeros(normal(40, 24).softmax(-1)), torch.tensor([0.3]), 8,
                         torch.tensor([2.3]), False),
    one_number=(UNIFORM, normal(1), torch.tensor([0.1]), torch.tensor([0.]), -8, 7),
    log_by_head=(LOG, (4 * normal(2, HEADS, 9, 9)).softmax(-1), BY_HEAD * 3, 4,
                 torch.tensor([1., 1.7, 3.]).view_as(BY_HEAD), False))
assert not set(MORE) & set(CASES) and STEPS.numel() == 1


class Unused:
    """Stands in for PyTorch's operations where they are not to be called."""

    def __getattr__(self, name):
        raise AssertionError(f'eager.{name} was called')


def check(name, dropping, device='cpu'):
    """One case, with and without numbers that are left as they are."""
    function, x, *rest = {**CASES, **MORE}[name]
    if function is LOG and len(rest) < 5:
        rest.append(0.0)
    keep = (normal(*x.shape) < 0).to(torch.uint8) if dropping else None
    x, *rest = (t.to(device) if torch.is_tensor(t) else t for t in (x, *rest, keep))
    found = []
    for kernels in (eager, triton_kernels):
        before, F.kernels = F.kernels, kernels
        triton_kernels.eager = Unused()
        try:
            found.append(values_and_gradients(function, x, *rest))
        finally:
            F.kernels, triton_kernels.eager = before, eager
    (want, want_x, want_scale), (got, got_x, got_scale) = found
    if function is UNIFORM:
        assert torch.equal(got, want), name
    # a number on the border of two powers may fall on either side
    apart = (want - got).abs() > 1e-5 * want.abs() + 1e-9
    assert apart.sum() <= x.numel() // 200, (name, apart.sum())
    same = ~apart
    torch.testing.assert_close(got_x[same], want_x[same], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_scale, want_scale, rtol=1e-3 if apart.any() else 1e-4, atol=1e-4)
    if dropping:
        kept = rest[-1] == 0
        assert torch.equal(got[kept], x[kept])


def check_no_numbers(device='cpu'):
    """NaN stays NaN, and a frozen scale or input gets no gradient."""
    x = torch.tensor([0.5, float('nan'), 0.25, 0.0], device=device)
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    for values in (triton_kernels.uniform_values(x, one * 0.1, zero, 0, 15),
                   triton_kernels.log_values(x, one, one, 4, True, 0.0)):
        assert values.isnan().tolist() == [False, True, False, False]
    found = triton_kernels.uniform_gradients(
        x, x, x, one, zero, 0, 15, of_x=False, of_scale=False)
    assert found[0] is None and found[1].tolist() == [0.0]


if __name__ == '__main__':
    for case in {**CASES, **MORE}:
        for some in (False, True):
            check(case, some)
        print(case)
    check_no_numbers()
    print('no numbers')
