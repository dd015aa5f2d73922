"""Turns between a learner and real Ray actors that record when they load, sleep and wake."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
import ray

from distillm_ray.cluster.device_turns import DeviceTurns
from distillm_ray.cluster.pool import ActorLost
from distillm_ray.cluster.rollout import GeneratorPool
from distillm_ray.config import GeneratorPoolConfig
from distillm_ray.types import Demand, Rollout
from tests import make
from tests.integration.actors import Actor, Events, remote, until
from tests.integration.fakes import FakeGenerator, demand

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


class SleepingGenerator(FakeGenerator):
    """Writes what it does to a file, which outlives its process."""

    def __init__(self, record: Path, at_sleep: str = "") -> None:
        super().__init__()
        self.record = record
        self.at_sleep = at_sleep

    def note(self, event: str) -> None:
        with self.record.open("a") as file:
            file.write(f"{event}\n")

    async def start(self) -> None:
        self.note("loads")

    async def sleep(self) -> None:
        await self.obey(self.at_sleep)
        self.note("sleeps")

    async def wake(self) -> None:
        self.note("wakes")

    async def generate(self, demand: Demand) -> Rollout:
        response = await super().generate(demand)
        self.note("responds")
        return response


class Devices:
    """One rank, and a pool of generators on its device."""

    def __init__(self, record: Path, *handles: Actor) -> None:
        self.record = record
        self.log = Events()
        self.turns = DeviceTurns(1)
        self.pool = GeneratorPool(
            handles,
            GeneratorPoolConfig(stall_timeout_s=60.0),
            keep_in_flight=True,
            startup_timeout_s=120.0,
            log=cast(Any, self.log),
            turns=self.turns,
        )
        self.turns.control(self.pool.sleep, self.pool.wake)

    async def respond(self, text: str = "") -> Rollout:
        async with self.turns.working():
            return await self.pool.generate(demand(text))

    async def learn(self) -> list[str]:
        """A turn of the rank; what the generators did in it."""
        assert await self.turns.take(0, 0, hurried=False, timeout_s=120.0)
        before = len(self.done)
        await asyncio.sleep(0.5)
        done = self.done[before:]
        self.turns.lend(0, 0)
        return done

    @property
    def done(self) -> list[str]:
        return self.record.read_text().split()


async def test_generators_sleep_in_the_learners_turns_and_wake_for_work_only(
    tmp_path: Path,
) -> None:
    record = tmp_path / "record"
    devices = Devices(record, remote(SleepingGenerator, record))
    await devices.pool.start()
    await devices.respond()
    learning = asyncio.create_task(devices.learn())
    await until(lambda: devices.turns.learners_hold)
    response = asyncio.create_task(devices.respond())
    assert await learning == []
    await response
    assert devices.done == ["loads", "responds", "sleeps", "wakes", "responds"]
    assert await devices.learn() == []
    assert await devices.learn() == []
    assert devices.done[5:] == ["sleeps"], "nothing needed them in between"
    assert devices.log.names == []


async def test_a_generator_that_dies_falling_asleep_loads_again_in_the_generators_turn(
    tmp_path: Path,
) -> None:
    record, once = tmp_path / "record", tmp_path / "died"
    devices = Devices(record, remote(SleepingGenerator, record, f"die once {once}"))
    await devices.pool.start()
    assert await devices.learn() == [], "the device is the learner's alone"
    assert devices.log.names == ["generator 0 failed"]
    await devices.respond()
    await until(lambda: "generator 0 is back" in devices.log.names)
    assert devices.done == ["loads", "loads", "responds"]


async def test_a_generator_that_died_asleep_is_replaced_when_it_is_woken(tmp_path: Path) -> None:
    record = tmp_path / "record"
    handle = remote(SleepingGenerator, record)
    devices = Devices(record, handle)
    await devices.pool.start()
    assert await devices.turns.take(0, 0, hurried=False, timeout_s=60.0)
    ray.kill(handle, no_restart=False)
    await asyncio.sleep(0.5)
    assert devices.done == ["loads", "sleeps"]
    devices.turns.lend(0, 0)
    try:
        response = await devices.respond()
    except ActorLost:
        response = await devices.respond()
    assert response.rollout_id == make.rollout("student-0").rollout_id
    assert devices.done[:3] == ["loads", "sleeps", "loads"]
    assert devices.done[-1] == "responds"
