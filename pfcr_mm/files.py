"""Files that are whole or not there."""
import errno
import os
import tempfile
from pathlib import Path

from .errors import FaultError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path, content):
    """Write bytes or text to a temporary file, sync it, rename it to `path`, sync the folder.

    Whatever happens, a kill or a power cut included, `path` is the old file or the
    new one.

    Returns:
        int: size in bytes.

    Raises:
        FaultError: the disk is full; the old file is as it was.
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    partial = None
    try:
        handle, partial = tempfile.mkstemp(prefix=f'.{path.name}-', suffix='.tmp', dir=path.parent)
        with os.fdopen(handle, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)
        if is_disk_full(error):
            raise FaultError(disk_full_line(error, path)) from None
        raise
    return len(content)


def make_writable(folder, key):
    """Make a folder, or raise UsageError, naming the config's key, where nothing can be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{key}='{folder}' cannot be written to: {error.strerror}") from None


def remove_partial(folder):
    """Remove what writes that were killed left in `folder`."""
    for path in Path(folder).glob('.*.tmp'):
        path.unlink(missing_ok=True)


def is_disk_full(error):
    """Whether an exception says that no more can be written: device, quota or file limit."""
    return isinstance(error, OSError) and error.errno in _FULL


def disk_full_line(error, path=None):
    """One line on a full disk."""
    path = path or error.filename or 'a file'
    return (f'{path} cannot be written: {os.strerror(error.errno)}; free some space and run the '
            'same command with --resume: what was saved before is whole')


def _sync_folder(folder):
    """Make the rename itself survive a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot sync a folder
    finally:
        os.close(handle)
