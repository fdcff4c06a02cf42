"""Native kernels give what PyTorch's operations give, whatever the layout."""
import multiprocessing
import re

import pytest
import torch
from kernel_cases import BY_HEAD, CASES, HEADS, LOG, ONE, STEPS, UNIFORM, normal
from marks import needs_compiler

from pfcr_mm.errors import UsageError
from pfcr_mm.quantizers import eager, native
from pfcr_mm.quantizers import functional as F

pytestmark = needs_compiler


@pytest.fixture(params=[1, 3], ids=['one-thread', 'three-threads'])
def threads(request, monkeypatch):
    monkeypatch.setattr(native, 'SHARE', 16)
    pool, used = native._threads(), []
    monkeypatch.setattr(native, '_threads', lambda: used.append(1) or pool)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
    assert bool(used) == (request.param > 1)


class Unused:
    """Stands in for PyTorch's operations where they are not to be called."""

    def __getattr__(self, name):
        raise AssertionError(f'eager.{name} was called')


def both(monkeypatch, function, x, scale, *rest, grad=None, keep=None):
    """Values, gradients of x and of the scale: by eager kernels, and by native ones."""
    found = []
    for kernels in (eager, native):
        monkeypatch.setattr(F, 'kernels', kernels)
        if kernels is native and native.library():
            monkeypatch.setattr(native, 'eager', Unused())
        x_, scale_ = x.detach().requires_grad_(), scale.clone().requires_grad_()
        values = function(x_, scale_, *rest, keep)
        values.backward(normal(*values.shape) if grad is None else grad)
        found.append((values.detach(), x_.grad, scale_.grad))
    monkeypatch.setattr(native, 'eager', eager)
    return found


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def arguments(function, rest):
    """What stands before `keep`: the shift, too, which has a default."""
    return (*rest, *[0.0] * (4 - len(rest))) if function is LOG else rest


def test_it_is_built_and_used():
    """With a compiler at hand, which the package's set-up asks for."""
    assert native.library() is not None, 'pfcr_mm.quantizers._native was not built; make setup'
    assert F.kernels is native


@pytest.mark.parametrize('share', [None, 0.5], ids=['all', 'dropped'])
@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients(name, share, threads, monkeypatch):
    function, x, scale, *rest = CASES[name]
    keep = None if share is None else (normal(*x.shape) < 0).to(torch.uint8)
    want, got = both(monkeypatch, function, x, scale, *arguments(function, rest), keep=keep)
    close(got, want)
    assert keep is not None or got[0].stride() == want[0].stride()
    if function is UNIFORM:
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert 0 < (got[1] == 0).float().mean() < 1  # clipped values are among them
    if keep is not None:
        assert torch.equal(got[0][keep == 0], x[keep == 0])
        assert torch.equal(got[1][keep == 0], normal(*x.shape)[keep == 0])


@pytest.mark.parametrize('zero_below', [False, True])
@pytest.mark.parametrize('bits', range(2, 9))
def test_logarithmic_grids_of_all_bits(bits, zero_below, monkeypatch):
    x = torch.rand(400, generator=torch.Generator().manual_seed(bits)).pow(6)
    want, got = both(monkeypatch, LOG, x, ONE * 4, bits, STEPS, zero_below, 0.0)
    close(got, want)
    assert len(got[0].unique()) <= 2**bits


@pytest.mark.parametrize('scale', [
    pytest.param(torch.linspace(0.1, 0.3, 12), id='channels'),
    pytest.param(torch.linspace(0.1, 0.3, 40).view(40, 1), id='rows')])
def test_many_scales(scale, threads, monkeypatch):
    x, zero = normal(40, 12), torch.round(scale * 20)
    want, got = both(monkeypatch, UNIFORM, x, scale, zero, 0, 7)
    close(got, want)
    assert torch.equal(got[0], want[0])
    steps = 1 + scale
    close(*reversed(both(monkeypatch, LOG, x.abs(), scale * 8, 3, steps, True, 0.0)))


@pytest.mark.parametrize('x', [
    pytest.param(normal(30, 14)[:, ::2], id='gaps'),
    pytest.param(normal(7, 30).t(), id='transposed'),
    pytest.param(normal(2, 3, 2, 3, 2, 3).permute(5, 0, 4, 1, 3, 2), id='six axes'),
    pytest.param(normal(1, 60, 1), id='a column')])
def test_layouts_that_rows_are_copied_for(x, threads, monkeypatch):
    want, got = both(monkeypatch, UNIFORM, x, ONE, torch.tensor([3.]), 0, 7,
                     grad=torch.ones(()).expand(x.shape))
    close(got, want)


def test_what_nobody_wants_is_not_made():
    x, zero = normal(40, 12), torch.tensor([5.])
    for function, *rest in ((native.uniform_gradients, ONE, zero, 0, 15),
                            (native.log_gradients, ONE, STEPS, 15, 0.17)):
        _, of_scale = function(x, x, x, *rest)
        nothing, same = function(x, x, x, *rest, of_x=False)
        assert nothing is None and torch.equal(of_scale, same)
        assert not function(x, x, x, *rest, of_scale=False)[1].any()


@pytest.mark.parametrize('count', [4, 70])
def test_what_is_no_number_stays_none(count):
    x = torch.full((count, ), 0.5)
    x[1], x[2], x[3] = float('nan'), float('inf'), 0.0
    for values in (native.uniform_values(x, ONE, ONE * 0, 0, 15),
                   native.log_values(x, ONE, STEPS, 4, True, 0.0),
                   native.log_values(x, ONE, STEPS, 8, False, 0.0)):
        assert values[1].isnan() and values[[0, 2, 3]].isfinite().all()
        assert values[2] == values.nan_to_num().max()
    _, grad_x, _ = (x, *native.log_gradients(x, x, x, ONE, STEPS, 15, 0.0))
    assert grad_x[1].isnan()


@pytest.mark.parametrize('scale, zero, keep', [
    pytest.param(torch.rand(3) + 1, torch.zeros(3), None, id='more scales than channels'),
    pytest.param(torch.rand(9) + 1, torch.zeros(9), None, id='many more'),
    pytest.param(torch.rand(4, 1) + 1, torch.ones(1, 1), None, id='one zero point'),
    pytest.param(ONE, torch.tensor([8]), None, id='an integer'),
    pytest.param(ONE, ONE * 0, torch.ones(4, 1), id='a share')])
def test_what_does_not_fit_is_left_to_pytorch(scale, zero, keep):
    """It broadcasts, or says why not; C would read what lies beside."""
    x = normal(4, 1)
    try:
        want = eager.uniform_values(x, scale, zero, 0, 15, keep)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            native.uniform_values(x, scale, zero, 0, 15, keep)
    else:
        assert torch.equal(native.uniform_values(x, scale, zero, 0, 15, keep), want)


def test_a_library_of_other_sources_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(native, 'VERSION', 0)
    native.library.cache_clear()
    try:
        with pytest.raises(UsageError, match='another version.*make setup'):
            native.library()
    finally:
        native.library.cache_clear()


def test_a_second_derivative_is_refused():
    x = normal(4, 5).requires_grad_()
    grad, = torch.autograd.grad(
        UNIFORM(x, ONE, ONE * 0, 0, 15).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_nothing_at_all():
    x = torch.zeros(0, 5)
    assert native.uniform_values(x, ONE, ONE * 0, 0, 15).shape == (0, 5)


def test_other_tensors_are_left_to_pytorch(monkeypatch):
    x, zero = normal(40, 12), torch.tensor([5.])
    values = native.uniform_values(x.double(), ONE.double(), zero.double(), 0, 15)
    assert values.dtype is torch.float64
    monkeypatch.setattr(native, 'library', lambda: None)
    assert torch.equal(native.uniform_values(x, ONE, zero, 0, 15), values.float())
    for name in ('queries', 'softmax'):
        function, x, scale, *rest = CASES[name]
        close(*both(monkeypatch, function, x, scale, *arguments(function, rest)))


def test_small_terms_of_long_sums_count():
    x = torch.full((2**22, ), 0.9)
    grad = torch.full_like(x, 1e-3)
    grad[0] = 1e5
    _, of_scale = native.uniform_gradients(grad, x, x, torch.tensor([1.]), ONE * 0, 0, 15)
    terms = grad.double() * (1.0 - x.double())
    assert of_scale.item() == pytest.approx(terms.sum().item(), rel=1e-5)


def _in_child(queue):
    x = normal(40, 12)
    queue.put(native.uniform_values(x, ONE, ONE * 0, 0, 15).sum().item())


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='no fork')
def test_threads_of_a_forked_process(monkeypatch):
    monkeypatch.setattr(native, 'SHARE', 16)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        want = native.uniform_values(normal(40, 12), ONE, ONE * 0, 0, 15).sum().item()
        context = multiprocessing.get_context('fork')
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(queue, ))
        child.start()
        assert queue.get(timeout=60) == want
        child.join()
    finally:
        torch.set_num_threads(before)


def test_heads_have_scales_of_their_own():
    """By hand: 0.26 on grids of 0.2, 0.3 and 0.4."""
    x = torch.full((1, HEADS, 1, 2), 0.26)
    values = native.uniform_values(x, BY_HEAD, torch.zeros_like(BY_HEAD), 0, 15)
    torch.testing.assert_close(values[0, :, 0, 1], torch.tensor([0.2, 0.3, 0.4]))
