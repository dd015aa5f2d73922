"""What a process uses and does, sent to the log by a thread of its own.

Every process of a run has a `Reporter`. It sends a reading of what the process and its children
have used since their start (log/costs.py), and the slices of the timeline that the process has
noted (log/timeline.py). No caller waits for it: a step costs its roles nothing but the notes.

A process that is killed takes what it has not sent along, at most INTERVAL_S.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import ray
from ray.actor import ActorProxy

from distillm_ray.cluster.busy_clock import BusyClock
from distillm_ray.cluster.log import LogActor
from distillm_ray.cluster.process_meter import ProcessMeter
from distillm_ray.log.costs import Role, RoleCost, Usage
from distillm_ray.log.prometheus import PoolState
from distillm_ray.log.timeline import Timeline

INTERVAL_S = 2.0
"""Between two reports. A reading takes a millisecond, most of it in Ray's call."""

CLOSING_S = 10.0
"""The longest wait for a report in progress."""


class Reporter:
    """Sends readings and slices of this process every INTERVAL_S, from `start` on.

    Args:
        role: of the process.
        more: readings of other sources that this process knows of; called in the thread.
        pools: the state of the pools of this process; likewise.
    """

    def __init__(
        self,
        role: Role,
        more: Callable[[], Sequence[Usage]] = tuple,
        pools: Callable[[], Sequence[PoolState]] = tuple,
    ) -> None:
        self.timeline = Timeline()
        self.busy = BusyClock()  # of the process's work; an actor's calls are timed by its pool
        self.tokens = 0
        self._role: Role = role
        self._more = more
        self._pools = pools
        self._log: ActorProxy[LogActor] | None = None
        self._ended = threading.Event()

    def start(self, log: ActorProxy[LogActor]) -> Self:
        """Begin to report."""
        self._log = log
        is_driver = self._role == "driver"
        self._meter = ProcessMeter(alone=is_driver)
        self._gpus = 0.0 if is_driver else _gpus_held()
        self._started_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name="reporter")
        self._thread.start()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Report for the last time, without waiting for the log. No call to Ray comes later."""
        self._ended.set()
        if self._log is not None:
            self._thread.join(CLOSING_S)
        self.send()

    def send(self) -> ray.ObjectRef[None] | None:
        """Report now; the log has it when the returned call is done. None before `start`."""
        if self._log is None:
            return None
        held = self._gpus * (time.monotonic() - self._started_at)
        own = RoleCost(gpu_seconds=held, busy_seconds=self.busy.seconds, tokens=self.tokens)
        usages = (self._meter.usage(self._role, own), *self._more())
        return self._log.report.remote(usages, self.timeline.take(), tuple(self._pools()))

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self.send()


class Reporting:
    """An actor that reports. Ray warns of restartable actors whose constructor takes a handle, so
    the log's comes in a call of its own, which a restarted process needs again.
    """

    @ray.method
    def report_to(self, log: ActorProxy[LogActor], role: Role) -> None:
        """Tell the log from now on what this process uses."""
        Reporter(role).start(log)


def _gpus_held() -> float:
    """Devices that Ray has assigned to this worker, fractions included."""
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))
