"""What the phases of a run take: time and memory."""
import resource
import sys
import time
from pathlib import Path

import torch


class Phase:
    """Adds the seconds of a `with` block to the loop's phases, and the peak memory after it."""

    def __init__(self, loop, name):
        self.loop, self.name = loop, name

    def __enter__(self):
        self.began = time.time()
        self.loop.open_phase = self

    def __exit__(self, *_):
        self.loop.open_phase = None
        self.add_to(self.loop.phases)

    def add_to(self, table):
        """Add what the block has taken so far."""
        entry = table.setdefault(self.name, dict(seconds=0.0, peak_memory_mb=0.0))
        entry['seconds'] += time.time() - self.began
        entry['peak_memory_mb'] = max(entry['peak_memory_mb'], peak_memory_mb())


def peak_memory_mb():
    """Peak memory so far in MiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path('/proc/self/status')  # rusage also knows who started the program
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith('VmHWM:'):
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == 'darwin' else 2**10)
