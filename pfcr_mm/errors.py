"""The errors that the tools tell in one line."""


class UsageError(ValueError):
    """A mistake of the user's, told in one line that names the key or file.

    The tools print it without a traceback and exit with code 2.
    """

    exit_code = 2


class FaultError(UsageError):
    """What failed around us: a full disk, no memory, a dead worker. Also one line.

    The config is fine, the same command may work later: the exit code is 1.
    """

    exit_code = 1
