"""Return memory that a CPU learner has freed to the operating system."""

from __future__ import annotations

import ctypes
import sys

import psutil

SLACK_BYTES = 512 * 2**20


class FreedMemory:
    """Returns freed pages to the operating system, for the other roles on this machine.

    Tensors of varying sizes leave holes in glibc's heaps, and glibc keeps the pages: the process
    grows by gigabytes over a run although its live tensors do not. But a page that was returned is
    cleared again when it is next used, which costs a tenth of a step if all are returned after
    each. So they are returned when the process has grown by `SLACK_BYTES` since the last time.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._smallest = 0  # bytes, after the last return

    def return_if_grown(self) -> None:
        """To be called between steps."""
        if sys.platform != "linux":
            return
        if self._process.memory_info().rss > self._smallest + SLACK_BYTES:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            self._smallest = self._process.memory_info().rss
