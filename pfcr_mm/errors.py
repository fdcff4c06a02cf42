"""The error that a user's mistake ends in."""


class UsageError(ValueError):
    """A mistake of the user's, told in one line that names the key or file.

    The tools print it without a traceback and exit with code 2.
    """
