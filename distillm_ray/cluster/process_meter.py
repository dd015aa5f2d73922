"""CPU seconds of processes, from the operating system's accounting."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence

import psutil
import ray

from distillm_ray.log.costs import Role, RoleCost, Usage

_SCAN_INTERVAL_S = 10.0
"""Between two looks for new child processes, which read the table of all processes."""


class ProcessMeter:
    """The CPU seconds of this process with its descendants, those that have ended included.

    Args:
        alone: without descendants. The driver's are Ray, where it has started it.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self._process = psutil.Process()
        self._alone = alone
        self._children: list[psutil.Process] = []
        self._scanned_at = -math.inf

    @property
    def age_s(self) -> float:
        """Seconds since the process was started."""
        return _age_s(self._process)

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        if self._alone:
            return _own_seconds(self._process)
        if time.monotonic() - self._scanned_at >= _SCAN_INTERVAL_S:
            self._scanned_at = time.monotonic()
            self._children = self._process.children(recursive=True)
        return _tree_seconds([self._process, *self._children])

    def usage(self, role: Role, cost: RoleCost | None = None) -> Usage:
        """A reading of this process; `cost` has what the meter does not know."""
        cost = cost or RoleCost()
        own = RoleCost(seconds=self.age_s, cpu_seconds=self.cpu_seconds())
        return Usage(role=role, source=source_of(os.getpid()), cost=own.plus(cost))


class RayMeter:
    """Readings of the Ray processes that this process has started, and of their workers.

    The ledger prefers what a worker says of itself. There are none where Ray runs by itself.
    """

    def __init__(self) -> None:
        self._daemons: list[psutil.Process] = []
        self._workers: list[list[psutil.Process]] = []  # each with its descendants
        self._scanned_at = -math.inf

    def usages(self) -> list[Usage]:
        """One reading a daemon and worker."""
        if time.monotonic() - self._scanned_at >= _SCAN_INTERVAL_S:
            self._scanned_at = time.monotonic()
            self._scan()
        usages: list[Usage] = []
        for process in self._daemons:  # workers are their children, and counted by themselves
            with contextlib.suppress(psutil.Error):
                usages.append(_seen(process, _own_seconds(process)))
        for worker in self._workers:
            with contextlib.suppress(psutil.Error):
                usages.append(_seen(worker[0], _tree_seconds(worker)))
        return usages

    def _scan(self) -> None:
        children: dict[int, list[psutil.Process]] = {}
        this = psutil.Process()
        for process in this.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                children.setdefault(process.ppid(), []).append(process)
        self._daemons, self._workers = [], []
        found = children.get(this.pid, [])
        while found:
            process = found.pop()
            if _is_worker(process):
                self._workers.append([process, *_below(process, children)])
            else:
                self._daemons.append(process)
                found += children.get(process.pid, [])


def source_of(pid: int) -> str:
    """The name of a process of this node in readings."""
    return f"{ray.get_runtime_context().get_node_id()}:{pid}"


def _seen(process: psutil.Process, cpu_seconds: float) -> Usage:
    cost = RoleCost(seconds=_age_s(process), cpu_seconds=cpu_seconds)
    return Usage(role="ray", source=source_of(process.pid), cost=cost)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "".join(process.cmdline()[:1]).startswith("ray::")
    except psutil.Error:
        return False


def _below(
    process: psutil.Process, children: dict[int, list[psutil.Process]]
) -> Iterator[psutil.Process]:
    for child in children.get(process.pid, []):
        yield child
        yield from _below(child, children)


def _age_s(process: psutil.Process) -> float:
    return time.time() - process.create_time()


def _own_seconds(process: psutil.Process) -> float:
    used = process.cpu_times()
    return used.user + used.system


def _tree_seconds(processes: Sequence[psutil.Process]) -> float:
    """With the children that ended and were waited for; a process that is gone counts there."""
    seconds = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            used = process.cpu_times()
            seconds += used.user + used.system + used.children_user + used.children_system
    return seconds
