"""Several processes at one run, forked from the test: they need no imports."""
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from mmengine.logging import MMLogger


class Ranks:
    """The processes of one run, started by hand as torchrun would.

    Args:
        size (int): how many.
        work (callable): called in each with its rank; gives the exit code.
        folder (Path): where `out.0`, `err.0`, ... go: what each prints.
    """

    def __init__(self, size, work, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server(('127.0.0.1', 0)) as free:
            port = free.getsockname()[1]
        self.pids = [self._fork(rank, size, port, work) for rank in range(size)]
        self.codes = [None] * size

    def _fork(self, rank, size, port, work):
        child = os.fork()
        if child:
            return child
        try:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            for number, name in ((1, 'out'), (2, 'err')):
                handle = os.open(self.folder / f'{name}.{rank}', os.O_WRONLY | os.O_CREAT)
                os.dup2(handle, number)
            sys.stdout, sys.stderr = (os.fdopen(n, 'w', buffering=1) for n in (1, 2))
            MMLogger._instance_dict.clear()
            torch.set_num_threads(1)  # threads do not survive a fork
            code = work(rank)
            sys.stdout.flush()
            os._exit(code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)

    def wait(self, seconds, until=None):
        """Exit codes by rank; a negative one is a signal, None has not ended.

        `until` is a rank whose end is enough.
        """
        deadline = time.monotonic() + seconds
        while (self.codes[until] is None if until is not None else None in self.codes):
            if time.monotonic() > deadline:
                break
            for rank, pid in enumerate(self.pids):
                if self.codes[rank] is None:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return self.codes

    def kill(self):
        """End what is left of them."""
        for pid, code in zip(self.pids, self.codes):
            if code is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def errors(self):
        """What each has printed on stderr."""
        return [(self.folder / f'err.{rank}').read_text() for rank in range(len(self.pids))]
