"""Memory that a CPU learner has freed and glibc has not."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give freed pages back to the operating system, for the other roles on this machine.

    Tensors of ever new sizes leave holes in glibc's heaps, which it keeps: a process grows by
    gigabytes over a run whose tensors at any one time do not.
    """
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
