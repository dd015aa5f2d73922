"""Real actors around fakes, for the tests of `distillm_ray/cluster/`.

The fixture in conftest.py kills every actor that a test has started here.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, cast

import ray
from ray.exceptions import RayActorError

from distillm_ray.cluster.control import start_control
from distillm_ray.cluster.learner import Links, Wires
from distillm_ray.cluster.log import LogActor
from distillm_ray.cluster.orchestrator import OrchestratorActor, TrainingPeers
from distillm_ray.cluster.targets import TargetStoreActor
from distillm_ray.config import Config
from distillm_ray.log.records import EventRecord, Record
from distillm_ray.replay.buffer import ReplayBuffer
from distillm_ray.teacher.target_key import TargetIdentity
from distillm_ray.types import Rollout, Work
from tests import make

Actor: TypeAlias = Any  # fakes and real actors alike
IDENTITY = TargetIdentity(teacher="t", kind="hidden", dtype="float32")
TIMEOUT_S = 60.0
_STARTED: list[Actor] = []


def remote(role: type, *arguments: Any, settings: Any = None, **options: Any) -> Actor:
    """An actor with the options of a pool's; `settings` are its keyword arguments."""
    defaults = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0, "max_concurrency": 100}
    decorate: Any = ray.remote  # its annotations know only some of its options
    _STARTED.append(decorate(**defaults | options)(role).remote(*arguments, **settings or {}))
    return _STARTED[-1]


def remote_control() -> Actor:
    """Run control as the driver starts it."""
    _STARTED.append(start_control())
    return _STARTED[-1]


def remote_stores(count: int, max_bytes: int = 20_000_000) -> list[Actor]:
    """Target stores of `max_bytes` each."""
    options = {"max_task_retries": 5, "max_concurrency": 1}
    return [remote(TargetStoreActor, max_bytes, **options) for _ in range(count)]


def remote_log(directory: Path) -> Actor:
    """The log of a new run."""
    settings = {"resume_step": None, "commit": "", "command": ""}
    return remote(LogActor, make.config(run={"directory": directory}), settings=settings)


def kill_all() -> None:
    """End every actor that was started here."""
    while _STARTED:
        ray.kill(_STARTED.pop())


def kill_and_await_restart(actor: Actor) -> None:
    """`ray.kill` returns before the actor is dead, and calls may still reach it."""

    def process() -> int | None:
        try:
            return get(actor.__ray_call__.remote(lambda _: os.getpid()))
        except RayActorError:
            return None

    before = process()
    ray.kill(actor, no_restart=False)
    while process() in (before, None):
        time.sleep(0.05)


def get(call: Any) -> Any:
    """The result of remote calls, within a limit."""
    return ray.get(call, timeout=TIMEOUT_S)


async def until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds, within a limit."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.01)


class Events:
    """A log that keeps the events of a pool."""

    actor = None  # members report their use to nobody

    def __init__(self) -> None:
        self.names: list[str] = []
        self.details: list[str] = []

    async def add(self, record: Record) -> None:
        assert isinstance(record, EventRecord)
        self.names.append(record.name)
        self.details.append(record.detail)


def events(log: Actor) -> list[EventRecord]:
    """The events in a log actor."""
    records, _ = get(log.since.remote(0))
    return [record for record in records if isinstance(record, EventRecord)]


def small_config(directory: Path, **sections: dict[str, Any]) -> Config:
    """Four steps of two sequences, with short limits."""
    defaults: dict[str, dict[str, Any]] = {
        "run": {"directory": directory / "run", "startup_timeout_s": 60},
        "learner": {"steps": 4, "batch_size": 2, "data_timeout_s": 60},
        "rollout": {"timeout_s": 30},
        "targets": {"max_bytes": 20_000_000},
    }
    for name, values in sections.items():
        defaults[name] = defaults.get(name, {}) | values
    return make.config(**defaults)


def start_links(
    config: Config,
    scorers: list[Actor],
    stores: list[Actor],
    *,
    buffer: Actor = None,
    data: Any = None,
    log: Actor = None,
) -> tuple[Links, Actor]:
    """A learner's clients, and the started orchestrator behind them."""
    peers = TrainingPeers(
        buffer=buffer,
        data=data,
        log=log or remote_log(config.run.local_directory),
        control=cast(Any, None),
        scorers=scorers,
        stores=stores,
        identity=IDENTITY,
    )
    orchestrator = remote(OrchestratorActor, config, config.rollout, (), peers)
    get(orchestrator.start.remote())
    wires = Wires(
        buffer=buffer,
        orchestrator=orchestrator,
        log=peers.log,
        control=cast(Any, None),
        driver_node="",
        stores=stores,
        identity=IDENTITY,
    )
    return Links.over(wires, config), orchestrator


class Producer:
    """The buffer as the orchestrator calls it, in this process."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer
        self.changed = asyncio.Event()

    async def work(self) -> Work:
        while not (demand := tuple(self.buffer.take_demand())):
            self.changed.clear()
            await self.changed.wait()
        return Work(incarnation=0, demand=demand, dataset=())

    async def add(self, rollout: Rollout) -> None:
        self.buffer.add(rollout)

    async def lose(self, ordinal: int) -> None:
        self.buffer.lose(ordinal)
        self.changed.set()

    async def give_up(self, ordinal: int, prompt_id: str) -> tuple[str, ...]:
        given_up = self.buffer.give_up(ordinal, prompt_id)
        self.changed.set()
        return given_up
