"""The run's log as an actor, and how the other roles write to it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import ray
from ray.actor import ActorProxy

from distillm_ray.cluster.actors import ask, beside_driver, reply
from distillm_ray.cluster.metrics_export import MetricsExport
from distillm_ray.cluster.process_meter import ProcessMeter
from distillm_ray.config import Config
from distillm_ray.log.costs import CostLedger, Role, Usage
from distillm_ray.log.health import HealthWatch
from distillm_ray.log.metrics import MetricsLog
from distillm_ray.log.prometheus import Metric, PoolState, Reading, of_phase, of_pool, of_record
from distillm_ray.log.records import COST_INTERVAL_S, CostRecord, DoneRecord, Record, StepRecord
from distillm_ray.log.stopping import Standing, read_standing
from distillm_ray.log.timeline import TIMELINE_FILE, Event, TimelineFile

_WHAT = "the log"


class LogActor:
    """A `MetricsLog` on the driver's node, where the run directory is known to be reachable.

    It also keeps the books of what the roles cost, writes the timeline and exports the metrics.
    """

    def __init__(
        self,
        config: Config,
        resume_step: int | None,
        commit: str,
        command: str,
        started: float | None = None,
    ) -> None:
        """`started`: the driver's start, in seconds since the epoch; now by default."""
        self._config = config
        self._export = MetricsExport(config.run.directory.name)
        self._pools: dict[Role, PoolState] = {}  # as they were at the last report
        planned = config.learner.num_steps
        self._export.add((Reading(metric=Metric.PLANNED_STEPS, value=planned),))
        self._log = MetricsLog(
            config.run.local_directory,
            resume_step=resume_step,
            commit=commit,
            command=command,
            export=lambda record: self._export.add(of_record(record)),
        )
        self._standing = read_standing(config)
        self._health = HealthWatch()
        self._meter = ProcessMeter()
        self._costs = CostLedger(time.monotonic())
        self._phase = "starting"
        resumed = resume_step is not None
        self._timeline = TimelineFile(
            config.run.local_directory / TIMELINE_FILE,
            max_events=config.run.timeline_events,
            started=time.time() if started is None else started,
            attempt=f"resumed from step {resume_step}" if resumed else "run started",
            resumed=resumed,
        )

    @ray.method
    def add(self, record: Record) -> None:
        """Append a record."""
        if isinstance(record, DoneRecord):
            self._close_costs()
        self._log.add(record)
        if isinstance(record, StepRecord):
            if self._costs.open_for(time.monotonic()) >= COST_INTERVAL_S:
                self._close_costs()
            self._health, warnings = self._health.after(record)
            for warning in warnings:
                self._log.add(warning)
        self._standing = self._standing.plus(
            record,
            metric=self._config.validation.metric,
            min_improvement=self._config.stop.min_improvement,
        )

    @ray.method
    def report(
        self, usages: Sequence[Usage], events: Sequence[Event], pools: Sequence[PoolState]
    ) -> None:
        """Take what a process used and did, and the state of its pools."""
        for usage in usages:
            self._costs.account(usage)
        self._timeline.add(events)
        for state in pools:
            self._export.add(of_pool(state, self._pools.get(state.role)))
            self._pools[state.role] = state
        self._export.renew()

    @ray.method
    def enter(self, phase: str) -> None:
        """The driver begins another phase."""
        self._close_costs()
        self._export.add(of_phase(phase, self._phase))
        self._phase = phase

    @ray.method
    def rewind(self, step: int) -> None:
        """Mark what came after `step` as superseded."""
        self._log.rewind(step)
        self._standing = read_standing(self._config)

    @ray.method
    def standing(self) -> Standing:
        """What the rules of `stop` look at, after the newest record."""
        return self._standing

    @ray.method
    def since(self, position: int) -> tuple[list[Record], int]:
        """Records added after `position`, and the position to ask for next."""
        return self._log.since(position)

    @ray.method
    def close(self) -> None:
        """Flush everything to disk."""
        self._log.close()
        self._timeline.close()

    def _close_costs(self) -> None:
        """Write what the roles have used since the last time."""
        self._costs.account(self._meter.usage("log"))
        seconds, roles = self._costs.close(time.monotonic())
        self._log.add(CostRecord(phase=self._phase, seconds=seconds, roles=roles))


def start_log(
    config: Config,
    *,
    resume_step: int | None,
    commit: str,
    command: str,
    started: float | None = None,
) -> ActorProxy[LogActor]:
    """Start the actor; it opens or continues the log of the run directory."""
    actor = beside_driver(LogActor, concurrent=False)
    return actor.remote(config, resume_step, commit, command, started)


class LogClient:
    """The actor as learners and the driver call it."""

    def __init__(self, actor: ActorProxy[LogActor]) -> None:
        self._actor = actor

    def add(self, record: Record) -> None:
        """Append a record; it is in the file when this returns."""
        ask(self._actor.add.remote(record), _WHAT)

    def enter(self, phase: str) -> None:
        """The driver begins another phase."""
        ask(self._actor.enter.remote(phase), _WHAT)

    def since(self, position: int) -> tuple[list[Record], int]:
        """Records added after `position`, and the position to ask for next."""
        return ask(self._actor.since.remote(position), _WHAT)

    def standing(self) -> Standing:
        """What the rules of `stop` look at, after the newest record."""
        return ask(self._actor.standing.remote(), _WHAT)

    def close(self) -> None:
        """Flush everything to disk."""
        ask(self._actor.close.remote(), _WHAT)


class AsyncLog:
    """The actor as asynchronous roles call it; without an actor, records are dropped."""

    def __init__(self, actor: ActorProxy[LogActor] | None) -> None:
        self.actor = actor

    async def add(self, record: Record) -> None:
        """Append a record; it is in the file when this returns."""
        if self.actor is not None:
            await reply(self.actor.add.remote(record), _WHAT)

    async def rewind(self, step: int) -> None:
        """Mark what came after `step` as superseded."""
        if self.actor is not None:
            await reply(self.actor.rewind.remote(step), _WHAT)
