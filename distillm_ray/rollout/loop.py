"""The loop that turns demand into scored sequences.

    buffer.work() ──► Generator ──► verdict ──► Scorer ──► TargetStore ──► buffer.add
         │                 ▲ newest weights
         └── data-set sequences of the coming steps ──► Scorer ──► TargetStore

It waits for nothing but work: the buffer says what the coming steps will draw, and every ordinal
and every data-set sequence is a task of its own, so that nothing waits for a slower neighbour. The
loop decides nothing about training and holds no payload; teacher targets pass it by reference.

What is retried, and how often: an ordinal whose generator failed goes back to the buffer, which
gives it out again, without a limit here (the pools limit how often an actor may fail in a row). A
response that the filter rejects is asked for again up to `MAX_REJECTED` times and then taken as it
is, because the schedule has promised its slot.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from distillm_ray.config import FilterConfig, SamplingConfig
from distillm_ray.log.records import Counters, EventRecord, Record
from distillm_ray.rollout.responses import ResponseFacts, response_facts, verdict
from distillm_ray.types import Demand, Prompt, Rollout, Weights, Work

MAX_REJECTED = 3


class ActorLost(Exception):
    """An actor died or hung during a call; its pool has already dealt with the actor."""


class BufferClient(Protocol):
    """The replay buffer, as this loop sees it."""

    async def work(self) -> Work | None:
        """Wait until there is some; None when the run is over."""
        ...

    async def add(self, rollout: Rollout) -> None:
        """A finished ordinal whose targets are stored."""
        ...

    async def lose(self, ordinal: int) -> None:
        """An ordinal to be given out again."""
        ...

    async def restore(self, state: bytes | None, completed: int) -> int:
        """Go to a checkpoint's state, or to the beginning; returns the new incarnation."""
        ...


class GeneratorPool(Protocol):
    """All generators of one model."""

    async def generate(self, demand: Demand) -> Rollout:
        """Answer a demand with weights of its minimum version or newer.

        Raises:
            ActorLost: the generator died or hung.
        """
        ...

    async def answer(self, prompt: Prompt, sampling: SamplingConfig, seed: int) -> Rollout:
        """Answer a prompt outside of the demand, with the newest weights; retried on a loss."""
        ...

    async def update(self, weights: Weights) -> float:
        """Bring every generator to these weights; returns the seconds of the slowest."""
        ...

    async def rewind(self) -> None:
        """Bring every generator back to the weights of the model directory."""
        ...


class TargetService(Protocol):
    """Scorers and stores: makes sure that the teacher's targets of a sequence are stored."""

    async def ensure(self, rollout: Rollout) -> int:
        """Score `rollout` unless a store has it; returns the tokens the teacher computed."""
        ...

    async def replace(self, rollout: Rollout) -> int:
        """Score `rollout` in any case: its id may stand for another text in the stores."""
        ...


class Log(Protocol):
    """Where events go."""

    async def add(self, record: Record) -> None:
        """Append a record."""
        ...


class RolloutLoop:
    """See the module. `targets` is None where the loss has no teacher."""

    def __init__(
        self,
        *,
        buffer: BufferClient,
        generators: GeneratorPool | None,
        targets: TargetService | None,
        log: Log,
        response_filter: FilterConfig,
    ) -> None:
        self._buffer = buffer
        self._generators = generators
        self._targets = targets
        self._log = log
        self._filter = response_filter
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._failed = asyncio.Event()
        self._rejected: Counter[int] = Counter()
        self._counts: Counter[str] = Counter()
        self._generating = BusyClock()
        self._scoring = BusyClock()
        self._sync_seconds = 0.0
        self._update: asyncio.Task[None] | None = None
        self._published = 0
        self._incarnation = 0
        self._restoring = asyncio.Lock()

    async def run(self) -> None:
        """Work until the buffer says that the run is over, and the last weights have arrived.

        Raises whatever a task of it raised: a failure here ends the run, it is never swallowed.
        """
        failed = asyncio.create_task(self._failed.wait())
        try:
            while True:
                work = asyncio.create_task(self._buffer.work())
                await asyncio.wait({work, failed}, return_when=asyncio.FIRST_COMPLETED)
                if self._failure is not None:
                    work.cancel()
                    raise self._failure
                todo = work.result()
                if todo is None:
                    if self._update is not None:
                        await self._update
                    return
                # New work may be here before the reply of the restore that opened it.
                async with self._restoring:
                    if todo.incarnation != self._incarnation:
                        continue  # asked for before a restore
                    for demand in todo.demand:
                        self._spawn(self._fulfil(demand))
                    for rollout in todo.dataset:
                        self._spawn(self.ensure_targets((rollout,)))
        finally:
            failed.cancel()
            await self._cancel_all()

    async def restore(self, state: bytes | None, completed: int) -> None:
        """Put the buffer to the learners' checkpoint and forget everything under way.

        Generators that hold weights from after it, which no longer exist, start anew.
        """
        async with self._restoring:
            await self._cancel_all()
            if self._published > completed and self._generators is not None:
                await self._generators.rewind()
            self._published = 0
            self._incarnation = await self._buffer.restore(state, completed)

    async def publish(self, weights: Weights) -> None:
        """Start bringing the generators to these weights; returns before they are there."""
        assert self._generators is not None, "weights were published but nothing generates"
        self._published = weights.version
        if self._update is not None:
            await self._update
        self._update = self._spawn(self._bring_to(weights))

    async def ensure_targets(self, rollouts: Sequence[Rollout]) -> None:
        """Have the targets of all these sequences stored, scoring what is missing."""
        targets = self._targets
        if targets is None:
            return
        with self._scoring.running():
            scored = await asyncio.gather(*(targets.ensure(rollout) for rollout in rollouts))
        self._count_scored(scored)

    async def answer(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
    ) -> list[Rollout]:
        """Answers outside of the demand (probes, evaluation), in the order of the prompts."""
        assert self._generators is not None
        if self._update is not None:
            await self._update
        generators = self._generators
        with self._generating.running():
            answers = await asyncio.gather(
                *(generators.answer(prompt, sampling, seed) for prompt in prompts)
            )
        self._counts["generated_tokens"] += sum(len(item.response_ids) for item in answers)
        self._counts["generated_sequences"] += len(answers)
        return answers

    def counters(self) -> Counters:
        """Work done so far. Seconds are of wall-clock with at least one call under way."""
        return Counters(
            **self._counts,
            generate_seconds=self._generating.seconds,
            score_seconds=self._scoring.seconds,
            sync_seconds=self._sync_seconds,
        )

    # ---- inside ---------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def _cancel_all(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._rejected.clear()
        self._update = None

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self._failure is None:
            self._failure = task.exception()
            self._failed.set()

    async def _fulfil(self, demand: Demand) -> None:
        """Generate, judge, score and shelve one ordinal, or give it back."""
        assert self._generators is not None, "an ordinal was demanded but nothing generates"
        try:
            with self._generating.running():
                rollout = await self._generators.generate(demand)
        except ActorLost as loss:
            await self._log.add(EventRecord(name="ordinal lost", detail=str(loss)))
            await self._lose(demand)
            return
        facts = response_facts(rollout)
        self._count(rollout, facts)
        reason = verdict(facts, self._filter)
        if reason is not None and self._rejected[demand.ordinal] < MAX_REJECTED:
            self._rejected[demand.ordinal] += 1
            self._counts["dropped"] += 1
            await self._lose(demand)
            return
        self._rejected.pop(demand.ordinal, None)
        if self._targets is not None:
            with self._scoring.running():
                self._count_scored([await self._targets.replace(rollout)])
        await self._buffer.add(rollout)

    async def _lose(self, demand: Demand) -> None:
        self._counts["lost"] += 1
        await self._buffer.lose(demand.ordinal)

    def _count_scored(self, tokens: Sequence[int]) -> None:
        self._counts["scored_sequences"] += sum(count > 0 for count in tokens)
        self._counts["scored_tokens"] += sum(tokens)

    def _count(self, rollout: Rollout, facts: ResponseFacts) -> None:
        self._counts["generated_sequences"] += 1
        self._counts["generated_tokens"] += len(rollout.response_ids)
        self._counts["truncated"] += facts.truncated
        self._counts["empty"] += facts.empty
        self._counts["looping"] += facts.looping

    async def _bring_to(self, weights: Weights) -> None:
        assert self._generators is not None
        self._sync_seconds += await self._generators.update(weights)


class BusyClock:
    """Seconds during which at least one piece of work was under way."""

    def __init__(self) -> None:
        self._running = 0
        self._since = 0.0
        self._total = 0.0

    @property
    def seconds(self) -> float:
        """So far, work still under way included."""
        now = time.monotonic() - self._since if self._running else 0.0
        return self._total + now

    @contextmanager
    def running(self) -> Iterator[None]:
        """Work is under way inside."""
        if self._running == 0:
            self._since = time.monotonic()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._total += time.monotonic() - self._since
