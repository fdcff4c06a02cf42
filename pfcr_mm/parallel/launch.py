"""Start and end the group of processes that a launcher made."""
import os
import subprocess
from datetime import timedelta

import torch
from torch import distributed

from ..errors import FaultError, UsageError
from .collectives import highest
from .watch import Watch

# How a launcher tells a process its rank, the number of all and its number on the machine.
_NAMES = dict(
    pytorch=('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    slurm=('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    mpi=('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'))
_MEETING = timedelta(minutes=5)  # all must have come by then
# The longest that one may work while the others wait; the end of one is seen by `Watch`.
_WAITING = timedelta(hours=2)
_watch = None


def rank_of_environment():
    """Rank before any group is formed, as far as the environment says; else 0."""
    found = [os.environ.get(names[0], '') for names in _NAMES.values()]
    return next((int(rank) for rank in found if rank.isdigit()), 0)


def start(launcher, program, advice=''):
    """Form the group: gloo on a CPU; on GPUs NCCL, and gloo for what lies on the CPU.

    MMEngine then finds it and makes none of its own, which would ask for a GPU.

    Args:
        launcher (str): 'none', 'pytorch' (torchrun), 'slurm' or 'mpi'.
        program (str): its name, for lines of error.
        advice (str): what to do where a process dies, put behind the line that says so.

    Raises:
        UsageError: the environment is not that launcher's; too few GPUs.
        FaultError: not all processes came.
    """
    global _watch
    if launcher == 'none' or distributed.is_initialized():
        return
    local_rank = _take_place(launcher)
    gpus = torch.cuda.device_count()
    try:
        store, rank, size = next(distributed.rendezvous('env://', timeout=_MEETING))
        distributed.init_process_group(
            'cpu:gloo,cuda:nccl' if gpus else 'gloo', store=store, rank=rank, world_size=size,
            timeout=_WAITING)
        _watch = Watch.start_all(program, advice)
    except (RuntimeError, OSError) as error:
        line = (str(error).strip().splitlines() or ['no message'])[0]
        raise FaultError(
            f"the processes of --launcher {launcher} did not find each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {line[:200]}") from None
    if gpus:
        if local_rank >= gpus:
            raise UsageError(
                f'{local_rank + 1} processes on a machine with {gpus} GPUs: start one a GPU, or '
                "set CUDA_VISIBLE_DEVICES='' to use the CPU")
        torch.cuda.set_device(local_rank)


def stop():
    """Leave the group, once all others want to."""
    global _watch
    if _watch is None:
        return
    highest(0)  # waits for all, on the CPU
    watch, _watch = _watch, None
    watch.leave()
    distributed.destroy_process_group()


def end(line, code, seconds=0.0):
    """End all processes with this exit code; the main process prints the line.

    Returns where there are no others, after doing nothing.

    Args:
        line (str): what went wrong.
        code (int): exit code of all.
        seconds (float): wait so long for another process's end to explain this one's.
    """
    if _watch is not None:
        _watch.end(line, code, seconds)


def _take_place(launcher):
    """Give torch's environment variables what the launcher says; returns the local rank."""
    names = _NAMES[launcher]
    values = [os.environ.get(name) for name in names]
    if values[2] is None and launcher == 'slurm' and values[0] is not None:
        values[2] = str(int(values[0]) % max(1, torch.cuda.device_count()))
    for name, value in zip(names, values):
        if value is None or not value.isdigit():
            how = dict(pytorch='tools/dist_quant.sh or torchrun', mpi='mpirun',
                       slurm='tools/slurm_quant.sh or srun')[launcher]
            raise UsageError(f'--launcher {launcher}: {name} is '
                             f"{'not set' if value is None else repr(value)}; start with {how}")
    os.environ.update(zip(_NAMES['pytorch'], values))
    os.environ.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in os.environ:
        if launcher == 'mpi':
            raise UsageError('--launcher mpi: MASTER_ADDR is not set; it is the host of rank 0')
        os.environ['MASTER_ADDR'] = _first_host() if launcher == 'slurm' else 'localhost'
    return int(values[2])


def _first_host():
    nodes = os.environ.get('SLURM_NODELIST') or os.environ.get('SLURM_JOB_NODELIST') or ''
    try:
        found = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True,
                               text=True, check=True).stdout.split()
        return found[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UsageError(
            '--launcher slurm: scontrol does not name the first host; set MASTER_ADDR') from None
