"""SIGINT and SIGTERM: end at the next safe place instead of anywhere."""
import os
import signal
import threading
import time
from contextlib import contextmanager

from .. import parallel

# A launcher passes a signal on to processes that may have had it from the terminal.
_ECHO = 2.0  # seconds


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by a signal.

    Args:
        signum (int): which one.
    """

    def __init__(self, signum):
        super().__init__(signum)
        self.signum = signum


class StopSignals:
    """Turns SIGINT and SIGTERM into `Stopped`, as a context manager.

    It is raised at once, but within `deferred` at the next `check`: an iteration is
    finished, a file is written to its end. A second signal does not wait. Of several
    processes all stop at the same `check`, whichever got the signal.
    """

    def __init__(self):
        self.signum, self._came = None, 0.0  # the last signal and its time
        self._deferring = False

    def __enter__(self):
        self._before = {}
        self._owner = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def check(self):
        """Raise `Stopped` if a signal came, here or in another process."""
        signum = parallel.highest(self.signum or 0)
        if signum:
            raise Stopped(signum)

    @contextmanager
    def deferred(self):
        """Signals wait for `check` here, and for the end of the block."""
        outer, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = outer
        if not outer:
            self.check()

    def _handle(self, signum, frame):
        if os.getpid() != self._owner:  # a data loading process has our handler, not our run
            return
        now = time.monotonic()
        if self.signum is not None and parallel.world_size() > 1 and now - self._came < _ECHO:
            return
        again, self.signum, self._came = self.signum is not None, signum, now
        if again or not self._deferring:
            raise Stopped(signum)
