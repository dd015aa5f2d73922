"""What the driver watches: phases, signals, run control, the learners and the log."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import ray
from ray.actor import ActorProxy
from ray.exceptions import RayActorError

from distillm_ray.cluster import preemption
from distillm_ray.cluster.actors import ask
from distillm_ray.cluster.control import ControlClient
from distillm_ray.cluster.learner import LearnerGroup
from distillm_ray.cluster.log import LogActor, LogClient
from distillm_ray.cluster.orchestrator import OrchestratorActor
from distillm_ray.cluster.process_meter import RayMeter
from distillm_ray.cluster.reporter import Reporter
from distillm_ray.errors import UserError
from distillm_ray.report.console import ConsoleView
from distillm_ray.types import TRAINING

Result = TypeVar("Result")

_POLL_S = 0.5


class Stopped(Exception):
    """The job was asked to stop while the learners did not train."""


class Watch:
    """The driver's view of a run. It decides whether a wait goes on.

    Args:
        view: shows phases, notes and records.
        leaving_nodes: ids of the nodes that the cluster will take away soon.
        check: raises a UserError if the run must not go on.
    """

    def __init__(
        self,
        view: ConsoleView,
        leaving_nodes: Callable[[], frozenset[str]] = preemption.leaving_nodes,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.view = view
        self._leaving_nodes = leaving_nodes
        self._check = check or (lambda: None)
        self.phase_seconds: dict[str, float] = {}
        self.control: ControlClient | None = None
        self.group: LearnerGroup | None = None
        self.log: LogClient | None = None
        self.reporter = Reporter("driver", RayMeter().usages)
        self.started_at = time.time()  # seconds since the epoch
        self._phase = ""
        self._stop = threading.Event()
        self._started = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a phase, tell run control and the log, and take its time. A stop request ends it."""
        self._phase = name
        self.view.start(name)
        self.interrupt()
        if self.log is not None:
            self.log.enter(name)
        started = time.monotonic()
        with self.reporter.timeline.slice("driver", "phases", name):
            yield
        self.phase_seconds[name] = time.monotonic() - started

    def interrupt(self) -> None:
        """End a wait by raising if the job was asked to stop or has failed.

        Raises:
            Stopped: the job was asked to stop.
            UserError: a role reported a failure, or the learners ended with one.
        """
        self.view.tick()
        self._check()
        if self.control is not None:
            status = self.control.update(self._phase, stop=self._stop.is_set())
            if status.failure is not None:
                raise UserError(status.failure)
        if self.group is not None and not self.group.is_alive():
            self.group.raise_failure()
        if self._stop.is_set() and self._phase != TRAINING:
            raise Stopped

    def wait_for(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which runs in a thread so that a stop request is noticed."""
        results: list[Result] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                failures.append(error)  # raised again below

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            self.interrupt()
        if failures:
            raise failures[0]
        return results[0]

    def follow(
        self,
        group: LearnerGroup,
        orchestrator: ActorProxy[OrchestratorActor],
        log_actor: ActorProxy[LogActor],
        *,
        last_weights_s: float,
    ) -> None:
        """Run learners and orchestrator side by side until the learners have ended.

        The generators may then still take the last weights, for `last_weights_s` at most. A stop
        request does not interrupt it: the learners see it and write a checkpoint.

        Raises:
            UserError: a role reported a failure.
            RunFailed: the learners kept failing.
        """
        assert self.control is not None
        log = LogClient(log_actor)
        rollouts = orchestrator.run.remote()  # opens the buffer
        position = 0
        told = False
        left: frozenset[str] = frozenset()
        losing: frozenset[str] = frozenset()
        while group.is_alive():
            group.join(_POLL_S)
            self._check()
            position = self._show(log, position)
            if self._stop.is_set() and not told:
                told = True
                self.view.note("stopping: the learners write a checkpoint first")
            leaving = self._leaving_nodes()
            for node in sorted(leaving - left):
                self.view.note(f"node {node} will be taken away")
            left |= leaving
            status = self.control.update(self._phase, stop=self._stop.is_set(), leaving=leaving)
            for node in status.losing - losing:
                group.expect_loss_of(node)
            losing |= status.losing
            self.view.waiting(status.waiting)
            if status.failure is not None:
                raise UserError(status.failure)
            if ray.wait([rollouts], timeout=0)[0] and group.is_alive():
                ask(rollouts, "the orchestrator")  # it returns before `finish` only by raising
        self._show(log, position)
        group.raise_failure()
        ask(orchestrator.finish.remote(), "the orchestrator")
        ask(
            rollouts,
            "the generators taking the last weights (rollout.timeout_s)",
            timeout_s=last_weights_s,
        )

    def _show(self, log: LogClient, position: int) -> int:
        """Show the records after `position`; returns how far the log was read."""
        try:
            records, position = log.since(position)
        except RayActorError:
            return position  # the learners, which write to the log, fail by its death
        for record in records:
            self.view.update(record)
        self.view.tick()
        return position

    @contextmanager
    def signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT asks to stop; a second SIGINT ends the driver at once."""
        previous: dict[int, Any] = {}  # what signal.signal returns has no narrower type

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stop.is_set() and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop.set()

        if threading.current_thread() is threading.main_thread():
            previous = {
                number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)
            }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
