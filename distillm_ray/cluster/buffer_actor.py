"""The replay buffer as an actor: who waits for what, and what its death means to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray

from distillm_ray.batching import draw_facts, plan_step
from distillm_ray.config import Config
from distillm_ray.errors import RunDirectoryError
from distillm_ray.replay.buffer import BufferCounters, ReplayBuffer
from distillm_ray.replay.schedule import Schedule
from distillm_ray.types import Prompt, RankPlan, Rollout, StepPlan, Validation, Work


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
        return RankPlan(facts=draw_facts(plan), micro_batches=plan.ranks[rank])

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
            seed=config.run.seed,
        )

    def _plan(self, step: int) -> StepPlan:
        if step not in self._plans:
            self._plans[step] = plan_step(
                self._buffer.draw(step),
                num_ranks=self._config.learner.workers,
                max_micro_batch_tokens=self._config.learner.max_micro_batch_tokens,
                loss=self._config.loss,
            )
        return self._plans[step]
