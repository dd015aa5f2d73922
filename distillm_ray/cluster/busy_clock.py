"""How long a role was busy: wall-clock seconds with a call to it in progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class BusyClock:
    """Wall-clock seconds during which calls were running."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running = 0
        self._since = 0.0  # the number of running calls changed last
        self._seconds = 0.0
        self._call_seconds = 0.0

    @property
    def seconds(self) -> float:
        """With at least one call running, up to now."""
        return self._seconds + (self._clock() - self._since if self._running else 0.0)

    @property
    def call_seconds(self) -> float:
        """Summed over the calls, up to now. Over a period: its length x the mean number of them."""
        return self._call_seconds + self._running * (self._clock() - self._since)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block as a running call."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        now = self._clock()
        if self._running:
            self._seconds += now - self._since
            self._call_seconds += self._running * (now - self._since)
        self._running += by
        self._since = now
