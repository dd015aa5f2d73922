"""The orchestrator's loop: it turns demand into scored sequences.

    buffer ── work ──► generate ──► filter ──► score ──► store ──► buffer.add
         │                ▲ newest weights
         └── data-set sequences of the coming steps ──► score ──► store

Every ordinal and every data-set sequence is a task of its own, so none waits for a slower one. The
orchestrator decides nothing about training and holds no payload: targets pass by reference.

    wait                         ends when                             limit
    -------------------------    ----------------------------------    -----------------------------
    `run`, for work              the buffer has work, a task failed,   none: an idle run waits
                                 or `finish` was called
    a task, for a generator      the pool returns or loses the call    the pool's
    a task, for a scorer         the targets are stored                the pool's
    `publish`                    the update before it is complete      the pool's
    work of a generator          it is the generators' turn on         none (device_turns.py)
                                 devices shared with the learners
    `respond`                    all responses are there               the pool's, for each response

Retries: an ordinal whose generator failed returns to the buffer, which gives it out again, without
a limit here (the pool limits how often an actor may fail in a row). A prompt that the pool gives up
leaves its ordinals to other prompts; more than `MAX_GIVEN_UP` of them end the run. An ordinal that
was aborted because it was slow is given out again `MAX_SLOW` times at most. A response that the
filter rejects is generated again up to `MAX_REJECTED` times and then trained on as it is, because
the schedule has promised its slot.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from distillm_ray.cluster.buffer import ReplayProducer
from distillm_ray.cluster.busy_clock import BusyClock
from distillm_ray.cluster.device_turns import DeviceTurns
from distillm_ray.cluster.elastic_pool import PoolSize
from distillm_ray.cluster.log import AsyncLog
from distillm_ray.cluster.pool import ActorLost, InputGivenUp
from distillm_ray.cluster.rollout import MAX_SLOW, GeneratorPool, PublishedWeights, too_slow
from distillm_ray.cluster.targets import ScorerPool
from distillm_ray.config import FilterConfig, SamplingConfig
from distillm_ray.errors import ClusterError
from distillm_ray.log.costs import Role, RoleCost
from distillm_ray.log.prometheus import PoolState
from distillm_ray.log.records import (
    ActorCounts,
    BufferSizes,
    Counters,
    EventRecord,
    StepRecord,
)
from distillm_ray.log.timeline import Timeline
from distillm_ray.rollout.generator import SlowRequest
from distillm_ray.rollout.responses import (
    MAX_REJECTED,
    response_counts,
    response_facts,
    verdict,
)
from distillm_ray.types import Demand, DrawFacts, Prompt, Rollout, TrainStep

MAX_GIVEN_UP = 8
"""How many prompts a run may give up: with more, the engines or the data are at fault."""


class Orchestrator:
    """The loop and the calls that the learners make to it. Plain: a test needs no cluster.

    Args:
        buffer: source of the demand; None where only `respond` is called (evaluation).
        generators: None where nothing generates.
        scorers: None where no term of the loss compares with a teacher.
        scores_rollouts: whether any compares the student's responses with it.
        waited: for how many seconds the learners have waited for samples; elastic pools follow it
            while `run` works. None: pools keep their size.
        timeline: gets a slice for each ordinal.
        turns: when the generators have the devices that they share with the learners; None: always.
    """

    def __init__(
        self,
        *,
        buffer: ReplayProducer | None,
        generators: GeneratorPool | None,
        scorers: ScorerPool | None,
        log: AsyncLog,
        response_filter: FilterConfig,
        scores_rollouts: bool = True,
        waited: Callable[[], Awaitable[float]] | None = None,
        timeline: Timeline | None = None,
        turns: DeviceTurns | None = None,
    ) -> None:
        self._timeline = timeline or Timeline()
        self._turns = turns or DeviceTurns()
        if generators is not None:
            self._turns.control(generators.sleep, generators.wake)
        self._waited = waited
        self._optional_buffer = buffer
        self._optional_generators = generators
        self._scorers = scorers
        self._log = log
        self._filter = response_filter
        self._scores_rollouts = scores_rollouts
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._wake = asyncio.Event()  # a task failed, or `finish` was called
        self._finished = False
        self._rejected: Counter[int] = Counter()  # by ordinal
        self._slow: Counter[int] = Counter()  # by ordinal
        self._given_up: set[str] = set()  # prompt ids
        self._counts: Counter[str] = Counter()
        self._generating = BusyClock()
        self._sync_seconds = 0.0
        self._update: asyncio.Task[None] | None = None
        self._newest: PublishedWeights | None = None
        self._published = 0
        self._incarnation = 0
        self._restored_once = False
        self._restoring = asyncio.Lock()

    async def start(self) -> None:
        """Start generators and scorers; returns when all are ready."""
        await asyncio.gather(*(pool.start() for pool in self._pools))

    def release_added(self) -> None:
        """End the actors that elastic pools have added. No work may be left."""
        for pool in self._pools:
            pool.release_added()

    async def run(self) -> None:
        """Work until `finish` is called and the last weights have arrived.

        The first exception of a task is raised here and ends the run.
        """
        woken = asyncio.create_task(self._wake.wait())
        following: list[asyncio.Task[None]] = []
        if self._waited is not None:
            following = [asyncio.create_task(pool.follow(self._waited)) for pool in self._pools]
        for task in following:  # a restore does not cancel them
            task.add_done_callback(self._ended)
        try:
            while True:
                work = asyncio.create_task(self._buffer.work())
                await asyncio.wait({work, woken}, return_when=asyncio.FIRST_COMPLETED)
                if woken.done():
                    work.cancel()
                    if self._failure is not None:
                        raise self._failure
                    if self._update is not None:
                        await self._update
                    return
                todo = work.result()
                # Work may arrive before the reply of the restore that made it.
                async with self._restoring:
                    if todo.incarnation != self._incarnation:
                        continue  # requested before a restore
                    for demand in todo.demand:
                        self._spawn(self._fulfil(demand))
                    for rollout in todo.dataset:
                        self._spawn(self.ensure_targets((rollout,)))
        finally:
            woken.cancel()
            for task in following:
                task.cancel()
            await self._cancel_all()
            await asyncio.gather(*following, return_exceptions=True)

    async def finish(self) -> None:
        """Make `run` return: the learners have ended."""
        self._finished = True
        self._turns.end()
        self._wake.set()

    async def restore(self, state: bytes | None, completed: int) -> None:
        """Reset the buffer and the log to the learners' checkpoint and cancel all running work.

        Generators whose weights are newer than the checkpoint start again.
        """
        async with self._restoring:
            if self._restored_once:
                await self._log.rewind(completed)
            self._restored_once = True
            await self._cancel_all()
            if self._published > completed and self._optional_generators is not None:
                await self._optional_generators.rewind()
            self._published = 0
            self._incarnation = await self._buffer.restore(state, completed)

    async def publish(self, weights: PublishedWeights) -> None:
        """Start to bring the generators to these weights; returns before they are there.

        While the learners have the devices, they take the place of weights published before, which
        no generator has taken yet.
        """
        self._published, self._newest = weights.version, weights
        if self._update is not None and not self._update.done():
            if self._turns.learners_hold:
                return
            await self._update
        self._update = self._spawn(self._bring_newest())

    async def ensure_targets(self, rollouts: Sequence[Rollout]) -> None:
        """Have the targets of all these sequences stored, scoring those that are missing."""
        scorers = self._scorers
        if scorers is None:
            return
        tokens = await asyncio.gather(*(scorers.ensure(rollout) for rollout in rollouts))
        self._counts["scored_sequences"] += sum(count > 0 for count in tokens)
        self._counts["scored_tokens"] += sum(tokens)

    async def respond(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
    ) -> list[Rollout]:
        """Responses outside of the demand (probes, evaluation), in the order of the prompts."""
        if self._update is not None:
            await self._update
        async with self._turns.working():
            responses = await self._responses(prompts, sampling, seed)
        self._counts["probe_tokens"] += sum(len(item.response_ids) for item in responses)
        self._counts["probe_sequences"] += len(responses)
        return responses

    async def _responses(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
    ) -> list[Rollout]:
        with self._generating.running():
            return await asyncio.gather(
                *(self._generators.respond(prompt, sampling, seed) for prompt in prompts)
            )

    async def take_device(
        self, attempt: int, rank: int, *, hurried: bool, timeout_s: float
    ) -> bool:
        """A learner asks for the device that it shares; whether it has it after `timeout_s`."""
        return await self._turns.take(attempt, rank, hurried=hurried, timeout_s=timeout_s)

    def lend_device(self, attempt: int, rank: int) -> None:
        """A learner has freed the device that it shares, and waits for the generators."""
        self._turns.lend(attempt, rank)

    def counters(self) -> Counters:
        """Work done so far; seconds are wall-clock time with at least one call running."""
        return Counters(
            **self._counts,
            generate_seconds=self._generating.seconds,
            score_seconds=0.0 if self._scorers is None else self._scorers.scoring.seconds,
            sync_seconds=self._sync_seconds,
        )

    def costs(self) -> dict[Role, RoleCost]:
        """What the pools know of their roles. May be called in another thread."""
        costs: dict[Role, RoleCost] = {}
        counts = self._counts
        if self._optional_generators is not None:
            tokens = counts["generated_tokens"] + counts["probe_tokens"]
            own = self._optional_generators.cost()
            costs["generator"] = dataclasses.replace(own, tokens=tokens)
        if self._scorers is not None:
            own = self._scorers.cost()
            costs["scorer"] = dataclasses.replace(own, tokens=counts["scored_tokens"])
        return costs

    def pools(self) -> list[PoolState]:
        """The state of its pools. May be called in another thread."""
        pools = (self._optional_generators, self._scorers)
        return [pool.state() for pool in pools if pool is not None]

    async def step_record(
        self, train: TrainStep, facts: DrawFacts, *, since: Counters
    ) -> tuple[StepRecord, Counters]:
        """The log's record of a step with the work done `since`, and the counts so far."""
        buffer = await self._buffer.counters()
        stores = await self._scorers.counters() if self._scorers is not None else []
        for warning in (text for store in stores for text in store.warnings):
            await self._log.add(EventRecord(name="target library", detail=warning))
        elsewhere = Counters(
            library_sequences=sum(store.library.sequences for store in stores),
            library_tokens=sum(store.library.tokens for store in stores),
            library_seconds=sum(store.library.seconds for store in stores),
            target_evictions=sum(store.evictions for store in stores),
            duplicates=buffer.duplicates,
            late=buffer.late,
        )
        work = self.counters().plus(elsewhere)
        sizes = BufferSizes(
            fresh=buffer.fresh,
            replay=buffer.replay,
            in_flight=buffer.outstanding,
            target_bytes=sum(store.nbytes for store in stores),
        )
        return StepRecord.build(
            train, facts, buffer=sizes, work=work.since(since), actors=self._actors()
        ), work

    # ---- inside ----------------------------------------------------------------------------------

    @property
    def _pools(self) -> list[GeneratorPool | ScorerPool]:
        return [pool for pool in (self._optional_generators, self._scorers) if pool is not None]

    def _actors(self) -> ActorCounts:
        none = PoolSize(ready=0, starting=0)
        generators = none if self._optional_generators is None else self._optional_generators.size
        scorers = none if self._scorers is None else self._scorers.size
        return ActorCounts(
            generators=generators.ready,
            generators_starting=generators.starting,
            scorers=scorers.ready,
            scorers_starting=scorers.starting,
        )

    @property
    def _buffer(self) -> ReplayProducer:
        assert self._optional_buffer is not None, "this orchestrator has no replay buffer"
        return self._optional_buffer

    @property
    def _generators(self) -> GeneratorPool:
        assert self._optional_generators is not None, "this orchestrator has no generators"
        return self._optional_generators

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _cancel_all(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._rejected.clear()
        self._slow.clear()
        self._given_up.clear()
        self._update = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self._failure is None:
            self._failure = task.exception()
            self._wake.set()

    async def _fulfil(self, demand: Demand) -> None:
        """Generate, filter, score and shelve one ordinal, or return it to the buffer."""
        name = f"ordinal {demand.ordinal}"
        with self._timeline.slice("orchestrator", "ordinals", name, apart=True):
            await self._work_on(demand)

    async def _work_on(self, demand: Demand) -> None:
        try:
            async with self._turns.working():
                with self._generating.running():
                    rollout = await self._generators.generate(demand)
        except InputGivenUp as reason:
            await self._give_up(demand, reason)
            return
        except (ActorLost, SlowRequest) as loss:
            if isinstance(loss, SlowRequest):
                self._slow[demand.ordinal] += 1
                if self._slow[demand.ordinal] >= MAX_SLOW:
                    raise too_slow(loss) from loss
            await self._log.add(EventRecord(name="ordinal lost", detail=str(loss)))
            await self._lose(demand)
            return
        self._slow.pop(demand.ordinal, None)
        facts = response_facts(rollout)
        self._counts.update(response_counts(rollout, facts))
        rejected = verdict(facts, self._filter) is not None
        if rejected and self._rejected[demand.ordinal] < MAX_REJECTED:
            self._rejected[demand.ordinal] += 1
            self._counts["dropped"] += 1
            await self._lose(demand)
            return
        self._rejected.pop(demand.ordinal, None)
        if self._scores_rollouts:
            await self.ensure_targets((rollout,))
        await self._buffer.add(rollout)

    async def _lose(self, demand: Demand) -> None:
        self._counts["lost"] += 1
        await self._buffer.lose(demand.ordinal)

    async def _give_up(self, demand: Demand, reason: InputGivenUp) -> None:
        """Have another prompt take the ordinal. Every prompt is named and counted once."""
        if demand.prompt_id not in self._given_up:
            self._given_up.add(demand.prompt_id)
            self._counts["given_up"] += 1
            await self._log.add(EventRecord(name="prompt given up", detail=str(reason)))
        given_up = await self._buffer.give_up(demand.ordinal, demand.prompt_id)
        if len(given_up) > MAX_GIVEN_UP:
            names = ", ".join(given_up)
            raise ClusterError(
                f"at most {MAX_GIVEN_UP} prompts may be given up, got {names}: the engines or these"
                f" rows are at fault. The last one: {reason}"
            ) from reason

    async def _bring_newest(self) -> None:
        async with self._turns.working():
            assert self._newest is not None
            self._sync_seconds += await self._generators.update(self._newest)
