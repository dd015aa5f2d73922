"""When a learner returns freed memory to the operating system."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from distillm_ray.learner import host_memory
from distillm_ray.learner.host_memory import SLACK_BYTES, FreedMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc alone keeps freed pages")


def test_pages_are_returned_when_the_process_has_grown_since_the_last_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident = 3 * SLACK_BYTES
    returns: list[int] = []

    def trim(_: int) -> None:
        nonlocal resident
        returns.append(resident)
        resident = 2 * SLACK_BYTES

    library: Any = SimpleNamespace(malloc_trim=trim)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=resident))
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(host_memory.psutil, "Process", lambda: process)
    freed = FreedMemory()
    freed.return_if_grown()
    assert returns == [3 * SLACK_BYTES]
    resident = 3 * SLACK_BYTES
    freed.return_if_grown()
    assert len(returns) == 1, "grown by no more than the slack"
    resident += 1
    freed.return_if_grown()
    assert len(returns) == 2
