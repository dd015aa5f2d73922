"""The run's log as an actor, and how the other roles write to it."""

from __future__ import annotations

import ray
from ray.actor import ActorProxy

from distillm_ray.cluster.actors import ask, beside_driver, reply
from distillm_ray.config import Config
from distillm_ray.log.health import HealthWatch
from distillm_ray.log.metrics import MetricsLog
from distillm_ray.log.records import Record, StepRecord
from distillm_ray.log.stopping import Standing, read_standing

_WHAT = "the log"


class LogActor:
    """A `MetricsLog` on the driver's node, where the run directory is known to be reachable."""

    def __init__(self, config: Config, resume_step: int | None, commit: str, command: str) -> None:
        self._config = config
        self._log = MetricsLog(
            config.run.directory, resume_step=resume_step, commit=commit, command=command
        )
        self._standing = read_standing(config)
        self._health = HealthWatch()

    @ray.method
    def add(self, record: Record) -> None:
        """Append a record."""
        self._log.add(record)
        if isinstance(record, StepRecord):
            self._health, warnings = self._health.after(record)
            for warning in warnings:
                self._log.add(warning)
        self._standing = self._standing.plus(
            record,
            metric=self._config.validation.metric,
            min_improvement=self._config.stop.min_improvement,
        )

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


def start_log(
    config: Config, *, resume_step: int | None, commit: str, command: str
) -> ActorProxy[LogActor]:
    """Start the actor; it opens or continues the log of the run directory."""
    actor = beside_driver(LogActor, concurrent=False)
    return actor.remote(config, resume_step, commit, command)


class LogClient:
    """The actor as learners and the driver call it."""

    def __init__(self, actor: ActorProxy[LogActor]) -> None:
        self._actor = actor

    def add(self, record: Record) -> None:
        """Append a record; it is in the file when this returns."""
        ask(self._actor.add.remote(record), _WHAT)

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
        self._actor = actor

    async def add(self, record: Record) -> None:
        """Append a record; it is in the file when this returns."""
        if self._actor is not None:
            await reply(self._actor.add.remote(record), _WHAT)

    async def rewind(self, step: int) -> None:
        """Mark what came after `step` as superseded."""
        if self._actor is not None:
            await reply(self._actor.rewind.remote(step), _WHAT)
