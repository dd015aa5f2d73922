"""Return memory that a CPU learner has freed to the operating system."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Return freed pages to the operating system, for the other roles on this machine.

    Tensors of varying sizes leave holes in glibc's heaps, and glibc keeps the pages: the process
    grows by gigabytes over a run although its live tensors do not.
    """
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
