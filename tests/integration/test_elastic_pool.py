"""A pool of real actors that grows for a learner that waits, and shrinks as psi falls."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from distillm_ray.cluster.elastic_pool import PoolSize
from distillm_ray.cluster.orchestrator_loop import Orchestrator
from distillm_ray.cluster.rollout import GeneratorPool
from distillm_ray.config import FilterConfig, GeneratorPoolConfig
from distillm_ray.replay.buffer import ReplayBuffer
from distillm_ray.replay.schedule import Schedule
from distillm_ray.types import Rollout, Shelf, Validation
from tests import make
from tests.integration.actors import Actor, Events, Producer, remote
from tests.integration.fakes import HeldGenerator

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

STEPS, BATCH_SIZE = 12, 8


class Starter:
    """Starts generators that a file opens in the place of real ones."""

    def __init__(self, opened_by: Path, **options: Any) -> None:
        self.opened_by = opened_by
        self.options = options

    def start_one(self) -> Actor:
        return remote(HeldGenerator, self.opened_by, **self.options)


def pool_of(starter: Starter, log: Events) -> GeneratorPool:
    actors = {"min": 1, "max": 2, "grow_after_s": 0.5, "shrink_after_s": 1.0}
    return GeneratorPool(
        [remote(HeldGenerator, starter.opened_by)],
        GeneratorPoolConfig.model_validate({"actors": actors, "max_in_flight": 2}),
        keep_in_flight=True,
        startup_timeout_s=120.0,
        log=cast(Any, log),
        starter=cast(Any, starter),
    )


async def train(starter: Starter, log: Events, *, until: str) -> list[Rollout]:
    """The fresh samples of a run whose psi falls from 1 to 0.

    No response ends before that event, and the run not before the pool has its first size again.
    """
    pool = pool_of(starter, log)
    buffer = ReplayBuffer(
        prompts=[make.prompt(f"p{index}") for index in range(15)],
        demonstrations=[],
        schedule=Schedule(phi=1.0, total_steps=STEPS, ratio="decreasing"),
        batch_size=BATCH_SIZE,
        capacity=64,
        min_size=BATCH_SIZE,
        lookahead=2,
        sync_interval=1,
        validation_interval=STEPS,
        seed=0,
    )
    waited_s = 0.0

    async def waited() -> float:
        return waited_s

    producer = Producer(buffer)
    loop = Orchestrator(
        buffer=cast(Any, producer),
        generators=pool,
        scorers=None,
        log=cast(Any, log),
        response_filter=FilterConfig(),
        waited=waited,
    )
    await loop.start()
    await pool.update(make.weights(7))
    running = asyncio.create_task(loop.run())
    clock = asyncio.get_running_loop().time
    fresh: list[Rollout] = []
    buffer.report(Validation(step=0, loss=1.0, tokens=1))
    for step in range(STEPS):
        while not buffer.ready(step):
            assert not running.done(), running.result()
            if until in log.names:
                starter.opened_by.touch()
            before = clock()
            await asyncio.sleep(0.01)
            waited_s += clock() - before
        drawn = buffer.draw(step).sequences
        fresh += [one.rollout for one in drawn if one.shelf is Shelf.FRESH]
        buffer.advance(step + 1)
        producer.changed.set()
    while pool.size != PoolSize(ready=1, starting=0):
        assert not running.done(), running.result()
        await asyncio.sleep(0.01)
    await loop.finish()
    await running
    return fresh


async def test_a_pool_goes_from_one_to_two_and_back_and_no_ordinal_is_lost(
    tmp_path: Path,
) -> None:
    log = Events()
    async with asyncio.timeout(200):
        fresh = await train(Starter(tmp_path / "open"), log, until="generator 1 joined")
    assert sorted(one.ordinal or 0 for one in fresh) == list(range(len(fresh)))
    assert len(fresh) > BATCH_SIZE * STEPS // 3
    assert len({one.text for one in fresh}) == 2, "both processes have responded"
    assert {one.version for one in fresh} == {7}, "the newest weights came before the first call"
    assert not [name for name in log.names if "lost" in name or "failed" in name]
    assert {"generator 1 joined", "generator 1 is released"} <= set(log.names)


async def test_a_run_completes_with_what_it_has_where_the_cluster_has_no_room(
    tmp_path: Path,
) -> None:
    log = Events()
    async with asyncio.timeout(200):
        fresh = await train(
            Starter(tmp_path / "open", num_gpus=1), log, until="generator 1 is asked for"
        )
    assert sorted(one.ordinal or 0 for one in fresh) == list(range(len(fresh)))
    assert set(log.names) == {"generator 1 is asked for", "generator 1 is no longer asked for"}
