"""tools/dist_quant.sh and tools/slurm_quant.sh: what they run."""
import os
import subprocess

import pytest
from demo_runs import REPO

TOOLS = REPO / 'tools'


@pytest.fixture()
def said(tmp_path):
    """said(script, *args, **env): words of the command that a script runs, on stand-ins."""
    for name in ('python', 'srun'):
        stand_in = tmp_path / name
        stand_in.write_text('#!/bin/sh\necho "$PYTHONPATH"\nprintf "%s\\n" "$@"\n')
        stand_in.chmod(0o755)

    def run(script, *args, **env):
        kept = {k: v for k, v in os.environ.items() if k not in (
            'NNODES', 'NODE_RANK', 'MASTER_ADDR', 'PORT', 'GPUS', 'GPUS_PER_NODE', 'PYTHON')}
        done = subprocess.run(
            [str(TOOLS / script), *args], capture_output=True, text=True, cwd=tmp_path,
            env={**kept, 'PATH': f"{tmp_path}:{os.environ['PATH']}", **env})
        if done.returncode:
            return done.returncode, done.stderr
        path, *words = done.stdout.splitlines()
        assert path.startswith(f'{TOOLS}/..')
        return words

    return run


def test_dist_quant_runs_torchrun_on_this_machine(said):
    assert said('dist_quant.sh', 'a b.py', '4', '--resume') == [
        '-m', 'torch.distributed.run', '--nnodes=1', '--node_rank=0', '--master_addr=127.0.0.1',
        '--master_port=29500', '--nproc_per_node=4', f'{TOOLS}/quant.py', 'a b.py', '--launcher',
        'pytorch', '--resume']


def test_dist_quant_on_several_machines_with_a_checkpoint(said):
    words = said('dist_quant.sh', 'c.py', 'float.pth', '2', NNODES='3', NODE_RANK='1',
                 MASTER_ADDR='first', PORT='12')
    assert words[2:7] == ['--nnodes=3', '--node_rank=1', '--master_addr=first',
                          '--master_port=12', '--nproc_per_node=2']
    assert words[7:] == [f'{TOOLS}/quant.py', 'c.py', 'float.pth', '--launcher', 'pytorch']


def test_slurm_quant_asks_for_a_gpu_a_process(said):
    words = said('slurm_quant.sh', 'part', 'job', 'c.py', 'float.pth', '--resume', GPUS='4',
                 SRUN_ARGS='--qos x')
    assert words == [
        '-p', 'part', '--job-name=job', '--ntasks=4', '--cpus-per-task=5', '--gres=gpu:4',
        '--ntasks-per-node=4', '--kill-on-bad-exit=1', '--qos', 'x', 'python', '-u',
        f'{TOOLS}/quant.py', 'c.py', 'float.pth', '--resume', '--launcher', 'slurm']


def test_slurm_quant_without_gpus(said):
    words = said('slurm_quant.sh', 'part', 'job', 'c.py', GPUS='2', GPUS_PER_NODE='0')
    assert '--ntasks=2' in words and not any('gres' in w or 'per-node' in w for w in words)


@pytest.mark.parametrize(('script', 'args'), [
    ('dist_quant.sh', ['c.py']), ('dist_quant.sh', ['c.py', 'float.pth']),
    ('dist_quant.sh', ['c.py', '0']), ('dist_quant.sh', ['c.py', 'float.pth', '--resume']),
    ('slurm_quant.sh', ['part', 'job']),
])
def test_too_few_words_give_the_usage(said, script, args):
    code, printed = said(script, *args)
    assert code == 2 and printed.startswith('usage: ') and printed.count('\n') == 1
