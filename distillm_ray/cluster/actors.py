"""The roles as classes that Ray can host: thin, asynchronous shells around the plain ones.

Each imports what its role needs in its own process, so that the driver loads no engine. Nothing
here decides anything; `cluster.py` says where these run, `pools.py` what happens when they fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from distillm_ray.batching import plan_step
from distillm_ray.config import Config, RolloutConfig, SamplingConfig, TargetsConfig, TeacherConfig
from distillm_ray.errors import RunDirectoryError
from distillm_ray.learner.prefetch import RankPlan
from distillm_ray.replay.buffer import BufferCounters, ReplayBuffer
from distillm_ray.replay.schedule import Schedule
from distillm_ray.report.metrics import MetricsLog
from distillm_ray.report.records import BufferSizes, DrawFacts, Record
from distillm_ray.rollout.generator import Generator
from distillm_ray.rollout.loop import Work
from distillm_ray.teacher.targets import StoreCounters, TargetStore
from distillm_ray.types import (
    Demand,
    Prompt,
    Rollout,
    ScoreReport,
    Source,
    StepPlan,
    TeacherTargets,
    Validation,
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


class BufferLost(Exception):
    """The replay buffer is not what the caller knew: its process died and another took its place.

    Nothing but a restore mends that. A learner fails with it, so that Ray Train restarts the group
    from the last checkpoint, which restores the buffer too.
    """


class BufferActor:
    """The replay buffer behind one condition: every change wakes whoever waits for it.

    It is empty until the learners have loaded their state and `restore` it to the same step, and
    again so when its process has died. Ray repeats the calls that were under way then: a restarted
    buffer lets the rollout loop wait for the restore and answers the learners with `BufferLost`.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._changed = asyncio.Condition()
        self._restored: ReplayBuffer | None = None
        context: Any = ray.get_runtime_context()
        self._replaces_a_dead_one: bool = context.was_current_actor_reconstructed
        self._incarnation = 0  # of the newest restore; no restore has 0
        self._plans: dict[int, StepPlan] = {}
        self._open = False  # nothing is trained on before the rollout loop works
        self._over = False
        self._stop = False
        self._failure: str | None = None
        self._completed = 0

    @property
    def _buffer(self) -> ReplayBuffer:
        if self._restored is None:
            raise BufferLost(
                "the replay buffer died and was restarted empty: the learners have to go back to"
                " the last checkpoint"
            )
        return self._restored

    # ---- the rollout loop ------------------------------------------------------------------------

    async def work(self) -> Work | None:
        """Wait for demand or data-set sequences to score; None when the run is over.

        The first call opens the buffer: from then on, draws are made.
        """
        async with self._changed:
            self._open = True
            self._changed.notify_all()
            while not self._over:
                if self._restored is not None:
                    demand = tuple(self._buffer.take_demand())
                    dataset = tuple(self._buffer.upcoming_dataset())
                    if demand or dataset:
                        return Work(incarnation=self._incarnation, demand=demand, dataset=dataset)
                await self._changed.wait()
        return None

    async def add(self, incarnation: int, rollout: Rollout) -> None:
        """See `ReplayBuffer.add`. Work of another incarnation is nothing to this one."""
        async with self._changed:
            if incarnation == self._incarnation:
                self._buffer.add(rollout)
                self._changed.notify_all()

    async def lose(self, incarnation: int, ordinal: int) -> None:
        """See `ReplayBuffer.lose`. Work of another incarnation is nothing to this one."""
        async with self._changed:
            if incarnation == self._incarnation:
                self._buffer.lose(ordinal)
                self._changed.notify_all()

    async def counters(self, incarnation: int) -> BufferCounters:
        """See `ReplayBuffer.counters`.

        Raises:
            BufferLost: they would be those of another incarnation.
        """
        counters = self._buffer.counters
        if incarnation != self._incarnation:
            raise BufferLost("the replay buffer died and was restored since")
        return counters

    # ---- the learners ----------------------------------------------------------------------------

    async def restore(
        self,
        incarnation: int,
        state: bytes | None,
        completed: int,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Rollout],
    ) -> bool:
        """Go to a checkpoint's state, or to the beginning, as the incarnation given.

        Returns whether a process that died was the one restored before.

        Raises:
            RunDirectoryError: the state is of other data, or of another version's format.
        """
        async with self._changed:
            self._restored = self._make(prompts, demonstrations)
            if state is not None:
                try:
                    self._restored.restore(state)
                except ValueError as error:
                    raise RunDirectoryError(str(error)) from error
            self._plans.clear()
            died = self._replaces_a_dead_one and self._incarnation == 0
            self._incarnation = incarnation
            self._completed = completed
            self._changed.notify_all()
            return died

    async def draw(self, step: int, rank: int, timeout_s: float) -> RankPlan | None:
        """This rank's share of a step; None if it is not ready after `timeout_s`.

        Raises:
            BufferLost: here and below, wherever the learners have not restored this process.
        """
        async with self._changed:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: self._buffer.ready(step) and self._open)
            except TimeoutError:
                return None
            plan = self._plan(step)
        return RankPlan(facts=DrawFacts.of(plan), micro_batches=plan.ranks[rank])

    async def waiting_for(self, step: int) -> str:
        """See `ReplayBuffer.waiting_for`."""
        return self._buffer.waiting_for(step)

    async def advance(self, completed: int) -> None:
        """See `ReplayBuffer.advance`."""
        async with self._changed:
            self._buffer.advance(completed)
            self._completed = completed
            self._plans = {step: plan for step, plan in self._plans.items() if step >= completed}
            self._changed.notify_all()

    async def report(self, validation: Validation) -> float:
        """See `ReplayBuffer.report`; returns phi."""
        async with self._changed:
            schedule = self._buffer.report(validation)
            self._changed.notify_all()
            return schedule.phi

    async def wants_weights(self) -> bool:
        """See `ReplayBuffer.wants_weights`."""
        return self._buffer.wants_weights

    async def state(self, completed: int) -> bytes:
        """See `ReplayBuffer.state`."""
        return self._buffer.state(completed)

    # ---- the driver ------------------------------------------------------------------------------

    async def finish(self) -> None:
        """The run is over: the rollout loop ends."""
        async with self._changed:
            self._over = True
            self._changed.notify_all()

    async def request_stop(self) -> None:
        """Ask the learners to checkpoint and return."""
        self._stop = True

    async def stop_requested(self) -> bool:
        """Whether that was asked."""
        return self._stop

    async def fail(self, message: str) -> None:
        """A learner met an error that a restart cannot mend; the driver ends the job with it."""
        self._failure = message

    async def failure(self) -> str | None:
        """What a learner reported, if it did."""
        return self._failure

    async def waiting(self) -> str:
        """What the next step waits for; empty if for nothing, or if there is none."""
        if self._restored is None and self._replaces_a_dead_one:
            return "the learners: the replay buffer died, and they go back to the last checkpoint"
        if self._restored is None or self._completed >= self._config.learner.steps:
            return ""
        return self._buffer.waiting_for(self._completed)

    def _make(self, prompts: Sequence[Prompt], demonstrations: Sequence[Rollout]) -> ReplayBuffer:
        config = self._config
        return ReplayBuffer(
            prompts=prompts,
            demonstrations=demonstrations,
            schedule=Schedule.from_config(config.schedule, total_steps=config.learner.steps),
            batch_size=config.learner.batch_size,
            capacity=config.replay.capacity,
            min_size=config.replay_min_size,
            lookahead=config.rollout.lookahead,
            sync_interval=config.rollout.sync_interval,
            validation_interval=config.validation.interval,
            total_steps=config.learner.steps,
            seed=config.run.seed,
        )

    def _plan(self, step: int) -> StepPlan:
        if step not in self._plans:
            self._plans[step] = plan_step(
                self._buffer.draw(step),
                num_ranks=self._config.learner.workers,
                max_micro_batch_tokens=self._config.learner.max_micro_batch_tokens,
                normalize=self._config.loss.normalize,
            )
        return self._plans[step]


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
