"""The roles as classes that Ray can host: thin, asynchronous shells around the plain ones.

Each imports what its role needs in its own process, so that the driver loads no engine. Nothing
here decides anything; `cluster.py` says where these run, `actor_pool.py` what follows where they
fail. The replay buffer and the rollout loop have files of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from distillm_ray.config import RolloutConfig, SamplingConfig, TargetsConfig, TeacherConfig
from distillm_ray.log.metrics import MetricsLog
from distillm_ray.log.records import BufferSizes, Record
from distillm_ray.replay.buffer import BufferCounters
from distillm_ray.rollout.generator import Generator
from distillm_ray.teacher.target_store import StoreCounters, TargetStore
from distillm_ray.types import (
    Demand,
    Prompt,
    Rollout,
    ScoreReport,
    Source,
    TeacherTargets,
    Weights,
)


class PooledActor:
    """An actor of a pool, which may be killed and restarted under the same handle."""

    async def process(self) -> str:
        """Another one after a restart."""
        return ray.get_runtime_context().get_worker_id()


class GeneratorActor(PooledActor):
    """A generator in a process of its own; resolves published weights before they go in."""

    def __init__(self, source: Source, config: RolloutConfig, **settings: Any) -> None:
        self._source = source
        self._generator = _make_generator(config, settings)

    async def start(self) -> None:
        """Load the model."""
        await self._generator.start()

    async def generate(self, demand: Demand) -> Rollout:
        """See `Generator.generate`."""
        return await self._generator.generate(demand)

    async def answer(self, prompt: Prompt, sampling: SamplingConfig, seed: int) -> Rollout:
        """See `Generator.complete`."""
        return await self._generator.complete(prompt, sampling, seed=seed, source=self._source)

    async def update_weights(self, weights: Weights, keep_in_flight: bool) -> float:
        """See `Generator.update_weights`."""
        buckets = await asyncio.gather(*(_resolve(bucket) for bucket in weights.buckets))
        resolved = Weights(version=weights.version, buckets=tuple(buckets), nbytes=weights.nbytes)
        return await self._generator.update_weights(resolved, keep_in_flight=keep_in_flight)

    async def stop(self) -> None:
        """Free the engine and its processes."""
        await self._generator.stop()


class ScorerActor(PooledActor):
    """A scorer in a process of its own."""

    def __init__(self, teacher: TeacherConfig, targets: TargetsConfig, **settings: Any) -> None:
        from distillm_ray.teacher.scorer import Scorer  # noqa: PLC0415  the driver loads no torch model

        self._scorer = Scorer(teacher, targets, **settings)

    async def start(self) -> None:
        """Load the teacher."""
        await self._scorer.start()

    async def score(self, rollout: Rollout) -> tuple[ScoreReport, TeacherTargets]:
        """See `Scorer.score`; Ray returns the two as two objects."""
        return await self._scorer.score(rollout)


class TargetStoreActor:
    """Owns payloads: what it keeps is a reference made by its own `ray.put`."""

    def __init__(self, max_bytes: int) -> None:
        self._store: TargetStore[ray.ObjectRef[Any]] = TargetStore(max_bytes)

    def put(self, rollout_id: str, payload: TeacherTargets, nbytes: int) -> bool:
        """Keep a payload; False if it is larger than the whole store."""
        return self._store.put(rollout_id, ray.put(payload), nbytes)

    def get(self, rollout_ids: Sequence[str]) -> dict[str, ray.ObjectRef[Any]]:
        """References to the payloads that are here."""
        return self._store.get(rollout_ids)

    def has(self, rollout_id: str) -> bool:
        """Whether it is here, without counting as a use."""
        return rollout_id in self._store

    def drop(self, rollout_ids: Sequence[str]) -> None:
        """Forget payloads that turned out to be lost."""
        self._store.drop(rollout_ids)

    def counters(self) -> StoreCounters:
        """See `TargetStore.counters`."""
        return self._store.counters


class MetricsActor:
    """The run's log in a process of its own."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self._log = MetricsLog(directory, **settings)

    def add(self, record: Record) -> None:
        """See `MetricsLog.add`."""
        self._log.add(record)

    def rewind(self, step: int) -> None:
        """See `MetricsLog.rewind`."""
        self._log.rewind(step)

    def since(self, position: int) -> tuple[list[Record], int]:
        """See `MetricsLog.since`."""
        return self._log.since(position)

    def close(self) -> None:
        """See `MetricsLog.close`."""
        self._log.close()


def buffer_sizes(buffer: BufferCounters, stores: Sequence[StoreCounters]) -> BufferSizes:
    """What the log keeps of the two."""
    return BufferSizes(
        fresh=buffer.fresh,
        replay=buffer.replay,
        in_flight=buffer.outstanding,
        target_bytes=sum(store.nbytes for store in stores),
    )


def _make_generator(config: RolloutConfig, settings: dict[str, Any]) -> Generator:
    # The driver and the other roles load no engine.
    match config.engine.type:
        case "vllm":
            from distillm_ray.rollout.vllm_engine import VllmGenerator  # noqa: PLC0415

            return VllmGenerator(config=config, **settings)
        case "transformers":
            from distillm_ray.rollout.transformers_engine import (  # noqa: PLC0415
                TransformersGenerator,
            )

            return TransformersGenerator(config=config, **settings)


async def _resolve(bucket: Any) -> Any:
    return await bucket
