"""The errors that the tools tell in one line."""
import math


class UsageError(ValueError):
    """A mistake of the user's, told in one line that names the key or file.

    The tools print it without a traceback and exit with code 2.
    """

    exit_code = 2


def check_keys(given, known, key):
    """Raise UsageError for the first of `given` that is not in `known`; `key` is their parent's."""
    for name in given:
        if name not in known:
            raise UsageError(f'{key}.{name} is not a known key; choose of {list(known)}')


def is_number(value):
    """Whether a value of a config is a finite number; True and False are none."""
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value))


class FaultError(UsageError):
    """What failed around us: a full disk, no memory, a dead worker. Also one line.

    The config is fine, the same command may work later: the exit code is 1.
    """

    exit_code = 1
