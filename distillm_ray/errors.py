"""Exceptions whose message is shown to the user. Any other exception is a bug.

The command line prints the message of a `UserError`, or of the OSError of a full disk or a file
that cannot be used, and exits with code 2; for a `RunFailed` it exits with code 1. A message gives
the key, file or line, the rule, the value, and the consequence or the remedy.
"""

from __future__ import annotations

import errno

# Values of OSError.errno.
NOT_ALLOWED = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Bad input. The message is complete without a stack trace."""


class ConfigError(UserError):
    """A config key is invalid, alone or in combination with others."""


class DataError(UserError):
    """A data file has an invalid row, column or encoding."""


class ModelError(UserError):
    """A model directory is unusable, or a teacher and a student do not fit together."""


class RunDirectoryError(UserError):
    """A run directory belongs to another run, or cannot be written or resumed."""


class StoreError(UserError):
    """An object store cannot be reached, refuses, or lacks what an address names."""


class ClusterError(UserError):
    """The cluster lacks what the config asks for, or something did not start in time."""


class RunFailed(RuntimeError):
    """Restarts could not repair a failure. The message says what failed and where to look."""
