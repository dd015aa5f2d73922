"""What a user can cause, and what a cluster can. The rest is a bug and may show its stack trace.

The command line prints the message of a `UserError` and exits with code 2; so it does with the
OSError of a full disk. A message names the key, file or line, the rule, the value, and the
consequence or the remedy. `RunFailed` exits with code 1.
"""

from __future__ import annotations

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError


class UserError(ValueError):
    """Bad input: the message is meant for the user, complete without a stack trace."""


class ConfigError(UserError):
    """A key of the config, alone or in combination with others."""


class DataError(UserError):
    """A data file: its rows, columns or encoding."""


class ModelError(UserError):
    """A model directory, or a teacher and student that do not fit together."""


class RunDirectoryError(UserError):
    """A run directory that belongs to another run, or cannot be written or resumed."""


class ClusterError(UserError):
    """The cluster lacks what the config asks for, or something did not start in time."""


class RunFailed(RuntimeError):
    """What restarts could not mend: the message says what failed and where more is known."""
