"""One run at a time in a work dir."""
import fcntl
import os
import socket
from pathlib import Path

from .. import parallel
from ..errors import UsageError

NAME = 'run.lock'
_HELD = {}  # path -> handle: a process may enter again


class WorkDirLock:
    """Holds a work dir for this process, as a context manager.

    Of several processes at one run the main one holds it.

    The lock is the kernel's (`flock`), so it goes when the process goes, however it
    ends; a file that stays behind means nothing. Process and host are in the file
    to be told to whoever comes second.

    Args:
        work_dir (str | Path): an existing folder.

    Raises:
        UsageError: on entry, where another process lives there.
    """

    def __init__(self, work_dir):
        self.path = Path(work_dir).resolve() / NAME
        self._outermost = False

    def __enter__(self):
        if self.path in _HELD or not parallel.is_main():
            return self
        handle = self._lock()
        if handle is not None:
            _HELD[self.path] = handle
            self._outermost = True
        return self

    def __exit__(self, *_):
        if self._outermost:
            self._outermost = False
            self.path.unlink(missing_ok=True)
            os.close(_HELD.pop(self.path))

    def _lock(self):
        while True:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise UsageError(
                    f'work dir {self.path.parent} cannot be written to: {error.strerror}') from None
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(handle, 200).decode(errors='replace').strip()
                os.close(handle)
                raise UsageError(
                    f'another run is at work in {self.path.parent} ({owner or "just starting"}); '
                    'wait for it, or give another --work-dir') from None
            except OSError:  # a file system without locks: nothing can be promised there
                os.close(handle)
                return None
            if self._is_current(handle):
                os.ftruncate(handle, 0)
                os.write(handle, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
                return handle
            os.close(handle)  # the one before us removed the file as it left

    def _is_current(self, handle):
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False


def _forget_in_child():
    """A data loading process must not keep the lock when its parent dies."""
    for handle in _HELD.values():
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_in_child)
