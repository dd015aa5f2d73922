"""The rollout loop in a process of its own, with its pools and its view of the other actors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distillm_ray.cluster.actor_pool import Actor
from distillm_ray.cluster.actors import buffer_sizes
from distillm_ray.cluster.pools import GENERATOR_CALL_TIMEOUTS, Generators, Targets
from distillm_ray.config import Config, SamplingConfig
from distillm_ray.log.records import Counters, EventRecord, Record, StepRecord
from distillm_ray.replay.buffer import BufferCounters
from distillm_ray.rollout.loop import RolloutLoop
from distillm_ray.types import DrawFacts, Prompt, Rollout, TrainStep, Weights, Work

_REQUESTS_PER_SCORER = 64  # queued at a scorer, so that its batches can fill


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoopPeers:
    """Whom a rollout loop talks to. Without a buffer it only answers prompts (evaluation)."""

    generators: Sequence[Actor]
    scorers: Sequence[Actor] = ()
    stores: Sequence[Actor] = ()
    buffer: Actor | None = None
    data: tuple[Any, Any] | None = None  # references to prompts and demonstrations
    metrics: Actor | None = None


class RolloutLoopActor:
    """Hosts a `RolloutLoop`."""

    def __init__(self, config: Config, peers: LoopPeers) -> None:
        self._config = config
        self._log = _Log(peers.metrics)
        self._buffer = _Buffer(peers.buffer, peers.data, self._log)
        self._stores = list(peers.stores)
        limits = {"startup_timeout_s": config.run.startup_timeout_s, "log": self._log}
        self._generators = None
        if peers.generators:
            self._generators = Generators(
                peers.generators,
                keep_in_flight=config.rollout.max_staleness > 0,
                max_in_flight=config.rollout.max_in_flight,
                call_timeout_s=GENERATOR_CALL_TIMEOUTS * config.rollout.timeout_s,
                **limits,
            )
        self._targets = None
        if peers.scorers:
            self._targets = Targets(
                peers.scorers,
                peers.stores,
                max_in_flight=_REQUESTS_PER_SCORER,
                call_timeout_s=config.rollout.timeout_s,
                **limits,
            )
        self._loop = RolloutLoop(
            buffer=self._buffer,
            generators=self._generators,
            targets=self._targets,
            log=self._log,
            response_filter=config.rollout.filter,
        )
        self._begun = False
        self._reported = Counters()

    async def start(self) -> None:
        """Start generators and scorers; returns when all are ready."""
        pools = [pool for pool in (self._generators, self._targets) if pool is not None]
        await asyncio.gather(*(pool.start() for pool in pools))

    async def run(self) -> None:
        """See `RolloutLoop.run`."""
        await self._loop.run()

    async def restore_buffer(self, state: bytes | None, completed: int) -> None:
        """See `RolloutLoop.restore`; the log goes back too."""
        if self._begun:
            await self._log.rewind(completed)
        self._begun = True
        await self._loop.restore(state, completed)

    async def publish(self, weights: Weights) -> None:
        """See `RolloutLoop.publish`."""
        await self._loop.publish(weights)

    async def ensure_targets(self, rollouts: Sequence[Rollout]) -> None:
        """See `RolloutLoop.ensure_targets`."""
        await self._loop.ensure_targets(rollouts)

    async def answer(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
    ) -> list[Rollout]:
        """See `RolloutLoop.answer`."""
        return await self._loop.answer(prompts, sampling, seed)

    async def report_step(self, train: TrainStep, facts: DrawFacts) -> None:
        """Log a step with what the other roles did since the last one."""
        buffer = await self._buffer.counters()
        stores = await asyncio.gather(*(store.counters.remote() for store in self._stores))
        work = self._loop.counters().plus(
            Counters(
                target_evictions=sum(store.evictions for store in stores),
                duplicates=buffer.duplicates,
                late=buffer.late,
            )
        )
        record = StepRecord.build(
            train,
            facts,
            buffer=buffer_sizes(buffer, stores),
            work=work.since(self._reported),
        )
        self._reported = work
        await self._log.add(record)


class _Buffer:
    """`loop.BufferClient` over the actor. The incarnations are counted here: this side survives."""

    def __init__(self, handle: Actor | None, data: tuple[Any, Any] | None, log: _Log) -> None:
        self._handle = handle
        self._data = data  # references to prompts and demonstrations, for a buffer that is empty
        self._log = log
        self._incarnation = 0

    async def work(self) -> Work | None:
        return await self._actor.work.remote()

    async def add(self, rollout: Rollout) -> None:
        await self._actor.add.remote(self._incarnation, rollout)

    async def lose(self, ordinal: int) -> None:
        await self._actor.lose.remote(self._incarnation, ordinal)

    async def restore(self, state: bytes | None, completed: int) -> int:
        assert self._data is not None, "a replay buffer needs prompts and demonstrations"
        self._incarnation += 1
        died = await self._actor.restore.remote(self._incarnation, state, completed, *self._data)
        if died:
            await self._log.add(
                EventRecord(
                    step=completed,
                    name="replay buffer died",
                    detail="restarted and restored from the learners' checkpoint",
                )
            )
        return self._incarnation

    async def counters(self) -> BufferCounters:
        return await self._actor.counters.remote(self._incarnation)

    @property
    def _actor(self) -> Actor:
        assert self._handle is not None, "this loop has no replay buffer: it only answers prompts"
        return self._handle


class _Log:
    """`loop.Log` over the actor; without one, nothing is kept."""

    def __init__(self, handle: Actor | None) -> None:
        self._handle = handle

    async def add(self, record: Record) -> None:
        if self._handle is not None:
            await self._handle.add.remote(record)

    async def rewind(self, step: int) -> None:
        if self._handle is not None:
            await self._handle.rewind.remote(step)
