"""How long a role was busy: wall-clock seconds with a call to it in progress."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class BusyClock:
    """Wall-clock seconds during which at least one call was running."""

    def __init__(self) -> None:
        self._running = 0
        self._since = 0.0
        self._total = 0.0

    @property
    def seconds(self) -> float:
        """So far, including calls that are still running."""
        now = time.monotonic() - self._since if self._running else 0.0
        return self._total + now

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block as a running call."""
        if self._running == 0:
            self._since = time.monotonic()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._total += time.monotonic() - self._since
