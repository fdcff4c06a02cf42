"""Units against plain float: steps of reconstruction, inference, files."""
import copy
import io

import torch

from ..reconstruction import harden
from .cases import KINDS, build_case
from .iteration import measure_iteration
from .timing import Stopwatch

# Of published code's step, beside AdaRound: half of inputs and activations float at random.
PUBLISHED = dict(keep_prob=0.5, input_mix=0.5)


def measure_units(size='demo', kinds=tuple(KINDS), pairs=15, clock='wall', device='cpu',
                  step=None):
    """Measure units of each kind.

    Args:
        size (str): of SIZES.
        kinds (Sequence[str]): of KINDS.
        pairs (int): measurements of each.
        clock (str): 'wall', or 'cpu' where other jobs share the machine.
        device (str): where to compute.
        step (dict | None): options of every step (UnitConfig): autocast, of float units too,
            compile and cuda_graphs.

    Returns:
        dict: plain data; ratios are medians of measurements in turn.
    """
    step = step or {}
    one_by_one = {**step, 'cuda_graphs': False}  # as published code makes steps

    def both(case, **options):
        return (measure_iteration(case, clock, pairs, straight, **own, **options)
                for straight, own in ((False, step), (True, one_by_one)))

    found = dict(
        machine=dict(torch=torch.__version__, threads=torch.get_num_threads(),
                     device=_name(torch.device(device)),
                     capability=torch.backends.cpu.get_cpu_capability()),
        size=size, pairs=pairs, clock=clock, step=step, bits='W4A4', iteration_ratio={},
        reference_iteration_ratio={}, speedup_over_reference={},
        published_step=dict(iteration_ratio={}, speedup_over_reference={}), inference_ratio={},
        milliseconds={})
    for kind in kinds:
        case = build_case(kind, size, device=device)
        ours, reference = both(case)
        found['iteration_ratio'][kind] = _ratio(ours)
        found['reference_iteration_ratio'][kind] = _ratio(reference)
        found['speedup_over_reference'][kind] = _speedup(ours, reference)
        found['milliseconds'][kind] = {
            name: round(1e3 * ours.median(name), 3) for name in ('float', 'iteration')}
        found['inference_ratio'][kind] = measure_inference(case, clock, pairs)
        case = build_case(kind, size, rounding='adaround', device=device)
        ours, reference = both(case, **PUBLISHED)
        found['published_step']['iteration_ratio'][kind] = _ratio(ours)
        found['published_step']['speedup_over_reference'][kind] = _speedup(ours, reference)
    if kinds:
        found['files'] = measure_files(build_case('swin_block', size), clock)
    return found


def _name(device):
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type


def _ratio(watch):
    return round(watch.ratio('iteration', 'float'), 3)


def _speedup(ours, reference):
    """Both are relative to the float step that was made in turn with them."""
    return round(reference.ratio('iteration', 'float') / ours.ratio('iteration', 'float'), 3)


@torch.no_grad()
def measure_inference(case, clock='wall', pairs=15):
    """Ratio of the forward pass of the hardened unit to that of the float one."""
    model = copy.deepcopy(case.model)
    harden(model)
    device = next(model.parameters()).device
    watch = Stopwatch(clock, device)
    state = case.inputs.batch(list(range(case.batch)), device)
    chain = case.chain_of(model)
    for _ in range(pairs + 3):
        for name, one in (('quantized', chain), ('float', case.float_chain)):
            watch.time(name, lambda one=one: one.run(state, case.unit.start, case.unit.stop))
    return round(watch.ratio('quantized', 'float'), 3)


def measure_files(case, clock='wall', times=7):
    """Milliseconds to save and load the state of the quantized backbone, and megabytes."""
    watch = Stopwatch(clock)
    for _ in range(times):
        file = io.BytesIO()
        watch.time('save', lambda file=file: torch.save(case.model.state_dict(), file))
        size = file.tell()
        file.seek(0)
        watch.time('load', lambda file=file: case.model.load_state_dict(
            torch.load(file, weights_only=True)))
    return dict(save_ms=round(1e3 * watch.median('save', 1), 2),
                load_ms=round(1e3 * watch.median('load', 1), 2), size_mb=round(size / 1e6, 3))
