"""The replay buffer as an actor, and its two clients.

orchestrator ── work, add, lose, restore ──► BufferActor ◄── draw, advance, report ── learners

wait       ends when                                            limit
-------    -------------------------------------------------    -------------------------------
`work`     there is demand or a sequence of data to score       `timeout_s`; the orchestrator asks
                                                                again, so it notices a silent buffer
`draw`     the step is ready and the orchestrator works         `timeout_s` of the call
`restore`  the state is read and the demand of it is open       `run.startup_timeout_s`
"""

from __future__ import annotations

import asyncio

import ray
from ray.actor import ActorProxy

from distillm_ray.batching import draw_facts, plan_step
from distillm_ray.cluster.actors import CALL_TIMEOUT_S, BufferLost, ask, beside_driver, reply
from distillm_ray.cluster.log import AsyncLog, LogActor
from distillm_ray.cluster.reporter import Reporter, Reporting
from distillm_ray.config import Config
from distillm_ray.errors import RunDirectoryError
from distillm_ray.log.costs import Role
from distillm_ray.log.records import EventRecord
from distillm_ray.loss.terms import loss_at
from distillm_ray.replay.buffer import ReplayBuffer
from distillm_ray.replay.build import build_buffer
from distillm_ray.types import (
    BufferCounters,
    RankPlan,
    Rollout,
    StepPlan,
    TrainingData,
    Validation,
    Work,
)

_WHAT = "the replay buffer"
_WORK_TIMEOUT_S = 60.0  # of one wait for work


class BufferActor(Reporting):
    """A `ReplayBuffer` behind a lock: a change wakes those whose wait it may end.

    A finished rollout wakes the ranks only where it completes the next step.

    It is empty until the learners have loaded their state and restore it to the same step. It is
    empty again when its process has died. Ray then repeats the interrupted calls: the restarted
    actor lets the orchestrator wait for the restore and raises `BufferLost` for the learners.

    Every restore has a number, its incarnation. Calls of the orchestrator carry the incarnation of
    their work; those of an earlier one are ignored.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._logs_ids = config.run.log_rollout_ids
        self._reporter = Reporter("buffer")
        self._lock = asyncio.Lock()
        self._work_changed = asyncio.Condition(self._lock)  # demand or a sequence to score
        self._draw_changed = asyncio.Condition(self._lock)  # a step may be ready
        self._restored: ReplayBuffer | None = None
        self._replaces_a_dead_one = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self._incarnation = 0  # of the newest restore; no restore has number 0
        self._plans: dict[int, StepPlan] = {}
        self._open = False  # no draw before the orchestrator works

    @property
    def _buffer(self) -> ReplayBuffer:
        if self._restored is None:
            raise BufferLost(
                "the replay buffer died and was restarted empty: the learners have to go back to"
                " the last checkpoint"
            )
        return self._restored

    @ray.method
    def report_to(self, log: ActorProxy[LogActor], role: Role) -> None:
        """Tell the log what this process uses and when it draws."""
        self._reporter.start(log)

    # ---- called by the orchestrator --------------------------------------------------------------

    @ray.method
    async def work(self, timeout_s: float) -> Work:
        """Demand, and sequences of data to score; none of both if none came in `timeout_s`.

        The first call opens the buffer. Sequences that no term compares with the teacher are not
        scored.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._work()
        except TimeoutError:
            return Work(incarnation=self._incarnation, demand=(), dataset=())

    async def _work(self) -> Work:
        async with self._lock:
            if not self._open:
                self._open = True
                self._draw_changed.notify_all()
            while True:
                if self._restored is not None:
                    demand = tuple(self._buffer.take_demand())
                    compares = self._config.loss.compares
                    upcoming = self._buffer.upcoming_dataset()
                    dataset = tuple(one for one in upcoming if compares(one.source))
                    if demand or dataset:
                        return Work(incarnation=self._incarnation, demand=demand, dataset=dataset)
                await self._work_changed.wait()

    @ray.method
    async def add(self, incarnation: int, rollout: Rollout) -> None:
        """Add a finished ordinal. Ignored if it belongs to an earlier incarnation."""
        async with self._lock:
            if incarnation == self._incarnation:
                was_ready = self._buffer.next_is_ready
                self._buffer.add(rollout)
                if not was_ready and self._buffer.next_is_ready:
                    self._draw_changed.notify_all()

    @ray.method
    async def lose(self, incarnation: int, ordinal: int) -> None:
        """Give an ordinal out again. Ignored if it belongs to an earlier incarnation."""
        async with self._lock:
            if incarnation == self._incarnation:
                self._buffer.lose(ordinal)
                self._work_changed.notify_all()

    @ray.method
    async def give_up(self, incarnation: int, ordinal: int, prompt_id: str) -> tuple[str, ...]:
        """Have other prompts take the place of this one, in this ordinal and in later ones.

        Returns the ids of all prompts that the run has given up, in earlier attempts too. Ignored
        if it belongs to an earlier incarnation.
        """
        async with self._lock:
            if incarnation != self._incarnation:
                return ()
            given_up = self._buffer.give_up(ordinal, prompt_id)
            self._work_changed.notify_all()
            return given_up

    @ray.method
    async def counters(self, incarnation: int) -> BufferCounters:
        """Sizes and totals.

        Raises:
            BufferLost: they would be those of another incarnation.
        """
        counters = self._buffer.counters
        if incarnation != self._incarnation:
            raise BufferLost("the replay buffer died and was restored since")
        return counters

    @ray.method
    async def restore(
        self,
        incarnation: int,
        state: bytes | None,
        data: TrainingData,
    ) -> bool:
        """Go to a checkpoint's state, or to the beginning, as the given incarnation.

        Returns whether this process replaces one that died.

        Raises:
            RunDirectoryError: the state is of other data or of another version's format.
        """
        async with self._lock:
            # In a thread: it reads all rows, and other calls must be answered meanwhile.
            self._restored = await asyncio.to_thread(build_buffer, self._config, data)
            if state is not None:
                try:
                    self._restored.restore(state)
                except ValueError as error:
                    raise RunDirectoryError(str(error)) from error
            self._plans.clear()
            died = self._replaces_a_dead_one and self._incarnation == 0
            self._incarnation = incarnation
            self._notify_all()
            return died

    # ---- called by the learners; all raise BufferLost until this process is restored -------------

    @ray.method
    async def draw(self, step: int, rank: int, timeout_s: float) -> RankPlan | None:
        """This rank's share of a step; None if it is not ready after `timeout_s`."""
        async with self._lock:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._draw_changed.wait_for(
                        lambda: self._buffer.ready(step) and self._open
                    )
            except TimeoutError:
                return None
            plan = self._plan(step)
        return RankPlan(
            phi=plan.phi,
            facts=draw_facts(plan, with_ids=self._logs_ids) if rank == 0 else None,
            micro_batches=plan.ranks[rank],
        )

    @ray.method
    async def waiting_for(self, step: int) -> str:
        """What the draw of `step` still lacks; empty if nothing."""
        return self._buffer.waiting_for(step)

    @ray.method
    async def advance(self, completed: int) -> None:
        """So many optimizer steps are completed."""
        async with self._lock:
            self._buffer.advance(completed)
            self._plans = {step: plan for step, plan in self._plans.items() if step >= completed}
            self._notify_all()

    @ray.method
    async def report(self, validation: Validation) -> float:
        """Adapt the schedule; returns phi from here on."""
        async with self._lock:
            schedule = self._buffer.report(validation)
            self._notify_all()
            return schedule.phi

    @ray.method
    async def wants_weights(self) -> bool:
        """Whether newly published weights can still start a generation, as phi stands."""
        return self._buffer.wants_weights

    @ray.method
    async def state(self, completed: int) -> bytes:
        """The buffer as of draw `completed`, for a checkpoint."""
        return self._buffer.state(completed)

    def _notify_all(self) -> None:
        self._work_changed.notify_all()
        self._draw_changed.notify_all()

    def _plan(self, step: int) -> StepPlan:
        if step not in self._plans:
            with self._reporter.timeline.slice("buffer", "draws", f"draw {step}"):
                self._plans[step] = plan_step(
                    self._buffer.draw(step),
                    num_ranks=self._config.learner.workers,
                    max_micro_batch_tokens=self._config.learner.max_micro_batch_tokens,
                    loss=loss_at(self._config.loss, step, num_steps=self._config.learner.num_steps),
                )
            self._draw_changed.notify_all()  # the step after it may be ready as well
        return self._plans[step]


def start_buffer(config: Config) -> ActorProxy[BufferActor]:
    """Start the actor on the driver's node; it is empty."""
    return beside_driver(BufferActor, survives=True).remote(config)


class ReplayProducer:
    """The actor as the orchestrator calls it.

    It counts the incarnations, because it survives a buffer that dies.
    """

    def __init__(
        self,
        actor: ActorProxy[BufferActor],
        data: ray.ObjectRef[TrainingData],
        log: AsyncLog,
        *,
        restore_limit_s: float,
    ) -> None:
        """`restore_limit_s`: of a restore, which reads all prompts and responses."""
        self._actor = actor
        self._data = data
        self._restore_limit_s = restore_limit_s
        self._log = log
        self._incarnation = 0

    async def work(self) -> Work:
        """Wait for work; there may be none after a while."""
        call = self._actor.work.remote(_WORK_TIMEOUT_S)
        return await reply(call, _WHAT, timeout_s=_WORK_TIMEOUT_S + CALL_TIMEOUT_S)

    async def add(self, rollout: Rollout) -> None:
        """Add a finished ordinal whose targets are stored."""
        await reply(self._actor.add.remote(self._incarnation, rollout), _WHAT)

    async def lose(self, ordinal: int) -> None:
        """Give an ordinal out again."""
        await reply(self._actor.lose.remote(self._incarnation, ordinal), _WHAT)

    async def give_up(self, ordinal: int, prompt_id: str) -> tuple[str, ...]:
        """Have other prompts take the place of this one; returns all that are given up."""
        call = self._actor.give_up.remote(self._incarnation, ordinal, prompt_id)
        return await reply(call, _WHAT)

    async def restore(self, state: bytes | None, completed: int) -> int:
        """Go to a checkpoint's state, or to the beginning; returns the new incarnation."""
        self._incarnation += 1
        died = await reply(
            self._actor.restore.remote(self._incarnation, state, self._data),
            "the replay buffer's restore (run.startup_timeout_s)",
            timeout_s=self._restore_limit_s,
        )
        if died:
            if self._log.actor is not None:
                await reply(self._actor.report_to.remote(self._log.actor, "buffer"), _WHAT)
            await self._log.add(
                EventRecord(
                    step=completed,
                    name="replay buffer died",
                    detail="restarted and restored from the learners' checkpoint",
                )
            )
        return self._incarnation

    async def counters(self) -> BufferCounters:
        """Sizes and totals."""
        return await reply(self._actor.counters.remote(self._incarnation), _WHAT)


class ReplayConsumer:
    """The actor as a learner calls it. Every call may raise `BufferLost`."""

    def __init__(self, actor: ActorProxy[BufferActor]) -> None:
        self._actor = actor

    def draw(self, step: int, rank: int, timeout_s: float) -> RankPlan | None:
        """This rank's share of a step; None if it is not ready after `timeout_s`."""
        call = self._actor.draw.remote(step, rank, timeout_s)
        return ask(call, "the replay buffer's draw", timeout_s=timeout_s + CALL_TIMEOUT_S)

    def waiting_for(self, step: int) -> str:
        """What the draw of `step` still lacks, for a message."""
        return ask(self._actor.waiting_for.remote(step), _WHAT)

    def advance(self, completed: int) -> None:
        """So many steps are done, and their weights were handed over if they were due."""
        ask(self._actor.advance.remote(completed), _WHAT)

    def report(self, validation: Validation) -> float:
        """Adapt the schedule; returns phi from here on."""
        return ask(self._actor.report.remote(validation), _WHAT)

    def wants_weights(self) -> bool:
        """Whether newly published weights can still start a generation."""
        return ask(self._actor.wants_weights.remote(), _WHAT)

    def state(self, completed: int) -> bytes:
        """The buffer as of draw `completed`, for a checkpoint."""
        return ask(self._actor.state.remote(completed), _WHAT)
