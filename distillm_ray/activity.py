"""Whether somebody who has work gets on with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Activity:
    """How long ago the last sign of progress was, while there is work.

    Example:
        >>> activity = Activity()
        >>> activity.silent_s  # nothing to do
        0.0
        >>> with activity.busy():
        ...     activity.sign()
        ...     activity.silent_s < 1.0
        True
    """

    def __init__(self) -> None:
        self._busy = 0
        self._last = 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count the block as a piece of work; its begin and end are signs."""
        self.sign()
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self.sign()

    def sign(self) -> None:
        """Something was done."""
        self._last = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign; 0 without work."""
        return time.monotonic() - self._last if self._busy else 0.0
