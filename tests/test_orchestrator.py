"""The orchestrator against a buffer, generators and scorers that are plain objects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest

from distillm_ray.cluster.orchestrator_loop import BusyClock, Orchestrator
from distillm_ray.cluster.pool import ActorLost
from distillm_ray.config import FilterConfig, SamplingConfig
from distillm_ray.log.records import EventRecord, Record
from distillm_ray.rollout.responses import MAX_REJECTED
from distillm_ray.types import Demand, FinishReason, Prompt, Rollout, Source, Weights, Work

SOON = 5.0  # seconds; nothing here takes more than a few milliseconds
LOOPING = [7] * 40


def prompt(index: int) -> Prompt:
    return Prompt(
        prompt_id=f"p{index}",
        token_ids=np.array([1, 2], dtype=np.int32),
        reference_ids=(),
        text="",
        references=(),
    )


def demand(ordinal: int, *, attempt: int = 0) -> Demand:
    return Demand(ordinal=ordinal, prompt=prompt(ordinal), min_version=0, attempt=attempt)


def rollout(
    name: str,
    token_ids: Sequence[int] = (5, 9),
    *,
    finish: FinishReason = FinishReason.STOP,
    ordinal: int | None = None,
) -> Rollout:
    return Rollout(
        rollout_id=name,
        prompt_id=f"p{ordinal}",
        prompt_ids=np.array([1, 2], dtype=np.int32),
        response_ids=np.array(token_ids, dtype=np.int32),
        loss_mask=np.ones(len(token_ids), dtype=np.bool_),
        source=Source.DATASET if ordinal is None else Source.STUDENT,
        version=0,
        finish_reason=finish,
        ordinal=ordinal,
    )


def weights(version: int) -> Weights:
    return Weights(version=version, buckets=(), nbytes=0)


class FakeBuffer:
    """Gives out what a test puts in; a lost ordinal is given out again, as the real one does."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.todo: asyncio.Queue[Work] = asyncio.Queue()
        self.added: list[Rollout] = []
        self.lost: list[int] = []
        self.incarnation = 0
        self.on_restore: Callable[[], None] = lambda: None
        self.expected = 0
        self.finish: Callable[[], None] = lambda: None

    async def work(self) -> Work:
        return await self.todo.get()

    def give(self, *demands: Demand, dataset: Sequence[Rollout] = ()) -> None:
        work = Work(incarnation=self.incarnation, demand=demands, dataset=tuple(dataset))
        self.todo.put_nowait(work)

    async def add(self, rollout: Rollout) -> None:
        self.events.append(f"add {rollout.rollout_id}")
        self.added.append(rollout)
        if len(self.added) == self.expected:
            self.finish()

    async def lose(self, ordinal: int) -> None:
        self.lost.append(ordinal)
        self.give(demand(ordinal, attempt=self.lost.count(ordinal)))

    async def restore(self, state: bytes | None, completed: int) -> int:
        self.incarnation += 1
        self.events.append(f"restore to {completed}")
        self.on_restore()
        await asyncio.sleep(0.01)  # the reply takes its time
        return self.incarnation


class FakeGenerators:
    """Answers by ordinal and attempt, from a script; by default at once and well."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.script: dict[tuple[int, int], Any] = {}
        self.cancelled: list[int] = []
        self.update_gate = asyncio.Event()
        self.update_gate.set()
        self.update_error: Exception | None = None

    async def generate(self, demand: Demand) -> Rollout:
        name = f"student-{demand.ordinal}"
        step = self.script.get((demand.ordinal, demand.attempt))
        if isinstance(step, Exception):
            raise step
        if isinstance(step, asyncio.Event):
            try:
                await step.wait()
            except asyncio.CancelledError:
                self.cancelled.append(demand.ordinal)
                raise
        if isinstance(step, Rollout):
            return step
        return rollout(name, (demand.attempt + 3, 9), ordinal=demand.ordinal)

    async def respond(self, prompt: Prompt, sampling: SamplingConfig, seed: int) -> Rollout:
        self.events.append(f"respond {prompt.prompt_id}")
        return rollout(f"response-{prompt.prompt_id}", (seed, 4, 9))

    async def update(self, weights: Weights) -> float:
        await self.update_gate.wait()
        if self.update_error is not None:
            raise self.update_error
        self.events.append(f"weights {weights.version}")
        return 0.5

    async def rewind(self) -> None:
        self.events.append("rewind")


class FakeTargets:
    """Counts two tokens a sequence that it does not have yet."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.stored: set[str] = set()

    async def ensure(self, rollout: Rollout) -> int:
        if rollout.rollout_id in self.stored:
            return 0
        await asyncio.sleep(0)
        self.events.append(f"score {rollout.rollout_id}")
        self.stored.add(rollout.rollout_id)
        return 2


class FakeLog:
    def __init__(self) -> None:
        self.records: list[Record] = []

    async def add(self, record: Record) -> None:
        self.records.append(record)

    async def rewind(self, step: int) -> None:
        pass


class House:
    """A loop with everything around it."""

    def __init__(self, *, teacher: bool = True, **response_filter: bool) -> None:
        self.events: list[str] = []
        self.buffer = FakeBuffer(self.events)
        self.generators = FakeGenerators(self.events)
        self.targets = FakeTargets(self.events)
        self.log = FakeLog()
        self.loop = Orchestrator(
            buffer=cast(Any, self.buffer),
            generators=cast(Any, self.generators),
            scorers=cast(Any, self.targets) if teacher else None,
            log=cast(Any, self.log),
            response_filter=FilterConfig(**response_filter),
        )
        self.buffer.finish = self.finish

    def finish(self) -> None:
        """The run is over."""
        self.finishing = asyncio.ensure_future(self.loop.finish())

    async def run_until(self, num_added: int) -> None:
        """Run until so many rollouts are shelved and the loop has ended."""
        self.buffer.expected = num_added
        await asyncio.wait_for(self.loop.run(), SOON)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.001)


# ---- ordinals -----------------------------------------------------------------------------------


async def test_a_rollout_is_shelved_only_after_its_targets_are_stored() -> None:
    house = House()
    house.buffer.give(demand(0), demand(1))
    await house.run_until(2)
    for name in ("student-0", "student-1"):
        assert house.events.index(f"score {name}") < house.events.index(f"add {name}")


async def test_a_slow_response_does_not_hold_up_the_others() -> None:
    house = House()
    gate = house.generators.script[0, 0] = asyncio.Event()
    house.buffer.give(demand(0), demand(1), demand(2))
    house.buffer.expected = 3
    run = asyncio.create_task(house.loop.run())
    await until(lambda: len(house.buffer.added) == 2)
    assert {one.ordinal for one in house.buffer.added} == {1, 2}
    gate.set()
    await asyncio.wait_for(run, SOON)
    assert [one.ordinal for one in house.buffer.added][-1] == 0


async def test_a_lost_ordinal_is_generated_again_and_named_in_the_log() -> None:
    house = House()
    house.generators.script[0, 0] = ActorLost("generator 1: it died")
    house.generators.script[0, 1] = ActorLost("generator 0: it died")
    house.buffer.give(demand(0))
    await house.run_until(1)
    assert house.buffer.lost == [0, 0]
    assert house.buffer.added[0].response_ids.tolist() == [2 + 3, 9]  # the third attempt
    details = [record.detail for record in house.log.records if isinstance(record, EventRecord)]
    assert details == ["generator 1: it died", "generator 0: it died"]
    assert house.loop.counters().lost == 2


async def test_without_a_teacher_nothing_is_scored() -> None:
    house = House(teacher=False)
    house.buffer.give(demand(0), dataset=[rollout("dataset-0")])
    await house.run_until(1)
    assert house.events == ["add student-0"]


async def test_data_set_sequences_are_scored_once() -> None:
    house = House()
    house.targets.stored.add("dataset-0")
    house.buffer.give(demand(0), dataset=[rollout("dataset-0"), rollout("dataset-1")])
    run = asyncio.create_task(house.loop.run())
    await until(lambda: house.loop.counters().scored_sequences == 2)
    house.finish()
    await asyncio.wait_for(run, SOON)
    assert sorted(event for event in house.events if event.startswith("score")) == [
        "score dataset-1",
        "score student-0",
    ]
    assert house.loop.counters().scored_tokens == 4


# ---- the filter ---------------------------------------------------------------------------------


async def test_a_rejected_response_is_asked_for_again() -> None:
    house = House(drop_looping=True)
    house.generators.script[0, 0] = rollout("student-0", LOOPING, ordinal=0)
    house.buffer.give(demand(0))
    await house.run_until(1)
    assert house.buffer.added[0].response_ids.tolist() == [4, 9]
    counters = house.loop.counters()
    assert (counters.dropped, counters.looping, counters.generated_sequences) == (1, 1, 2)
    assert house.events == ["score student-0", "add student-0"]


async def test_after_the_last_rejection_the_slot_takes_what_comes() -> None:
    house = House(drop_truncated=True)
    cut = rollout("student-0", (5, 6), finish=FinishReason.LENGTH, ordinal=0)
    for attempt in range(MAX_REJECTED + 1):
        house.generators.script[0, attempt] = cut
    house.buffer.give(demand(0))
    await house.run_until(1)
    assert house.buffer.added == [cut]
    assert house.buffer.lost == [0] * MAX_REJECTED
    counters = house.loop.counters()
    assert (counters.dropped, counters.truncated) == (MAX_REJECTED, MAX_REJECTED + 1)


async def test_rejections_of_one_ordinal_do_not_count_for_another() -> None:
    house = House(drop_truncated=True)
    for ordinal in (0, 1):
        for attempt in range(MAX_REJECTED):
            house.generators.script[ordinal, attempt] = rollout(
                f"student-{ordinal}", (5, 6), finish=FinishReason.LENGTH, ordinal=ordinal
            )
    house.buffer.give(demand(0), demand(1))
    await house.run_until(2)
    assert all(one.finish_reason is FinishReason.STOP for one in house.buffer.added)


async def test_what_the_filter_keeps_is_counted_all_the_same() -> None:
    house = House()
    house.generators.script[0, 0] = rollout("student-0", LOOPING, ordinal=0)
    house.generators.script[1, 0] = rollout(
        "student-1", (5, 6, 7), finish=FinishReason.LENGTH, ordinal=1
    )
    house.generators.script[2, 0] = rollout("student-2", (9,), ordinal=2)
    house.buffer.give(demand(0), demand(1), demand(2))
    await house.run_until(3)
    counters = house.loop.counters()
    assert (counters.looping, counters.truncated, counters.empty) == (1, 1, 1)
    assert counters.generated_tokens == len(LOOPING) + 3 + 1
    assert (counters.dropped, counters.lost) == (0, 0)


# ---- failures -----------------------------------------------------------------------------------


async def test_a_failing_task_ends_the_run_with_its_own_error_and_cancels_the_rest() -> None:
    house = House()
    house.generators.script[0, 0] = asyncio.Event()
    house.generators.script[1, 0] = ZeroDivisionError("of a task")
    house.buffer.give(demand(0), demand(1))
    with pytest.raises(ZeroDivisionError, match="of a task"):
        await asyncio.wait_for(house.loop.run(), SOON)
    assert house.generators.cancelled == [0]
    assert house.buffer.added == []


async def test_an_update_that_fails_ends_the_run() -> None:
    house = House()
    house.generators.update_error = RuntimeError("no weights")
    run = asyncio.create_task(house.loop.run())
    await house.loop.publish(weights(1))
    with pytest.raises(RuntimeError, match="no weights"):
        await asyncio.wait_for(run, SOON)


# ---- weights ------------------------------------------------------------------------------------


async def test_publishing_returns_before_the_weights_have_arrived() -> None:
    house = House()
    house.generators.update_gate.clear()
    await asyncio.wait_for(house.loop.publish(weights(1)), SOON)
    assert house.events == []
    house.generators.update_gate.set()
    await house.loop.publish(weights(2))  # waits for the first one
    assert house.events == ["weights 1"]
    await until(lambda: house.events == ["weights 1", "weights 2"])
    assert house.loop.counters().sync_seconds == 1.0


async def test_responses_come_from_the_weights_published_last() -> None:
    house = House()
    house.generators.update_gate.clear()
    await house.loop.publish(weights(1))
    responses = asyncio.create_task(house.loop.respond([prompt(3), prompt(1)], SamplingConfig(), 6))
    await asyncio.sleep(0.01)
    assert house.events == []
    house.generators.update_gate.set()
    got = await asyncio.wait_for(responses, SOON)
    assert house.events == ["weights 1", "respond p3", "respond p1"]
    assert [one.rollout_id for one in got] == ["response-p3", "response-p1"]
    assert house.loop.counters().generated_tokens == 6


async def test_the_run_ends_after_the_last_weights_have_arrived() -> None:
    """They are what is evaluated next."""
    house = House()
    house.generators.update_gate.clear()
    run = asyncio.create_task(house.loop.run())
    await house.loop.publish(weights(9))
    house.finish()
    await asyncio.sleep(0.01)
    assert not run.done()
    house.generators.update_gate.set()
    await asyncio.wait_for(run, SOON)
    assert house.events == ["weights 9"]


# ---- restore ------------------------------------------------------------------------------------


async def test_a_restore_cancels_what_is_under_way_and_goes_on_with_new_work() -> None:
    house = House()
    house.generators.script[0, 0] = asyncio.Event()
    house.buffer.give(demand(0))
    run = asyncio.create_task(house.loop.run())
    await asyncio.sleep(0.01)
    await house.loop.restore(b"state", 4)
    assert house.generators.cancelled == [0]
    house.buffer.expected = 1
    house.buffer.give(demand(1))
    await asyncio.wait_for(run, SOON)
    assert [one.ordinal for one in house.buffer.added] == [1]


async def test_work_from_before_a_restore_is_not_done_and_work_from_after_it_is() -> None:
    """Even if the old work arrives while restoring, and the new work before the reply."""
    house = House()
    house.buffer.expected = 1
    run = asyncio.create_task(house.loop.run())

    def arrive() -> None:
        house.buffer.todo.put_nowait(Work(incarnation=0, demand=(demand(7),), dataset=()))
        house.buffer.give(demand(8))

    house.buffer.on_restore = arrive
    await house.loop.restore(None, 0)
    await asyncio.wait_for(run, SOON)
    assert [one.ordinal for one in house.buffer.added] == [8]


async def test_rejections_are_forgotten_by_a_restore() -> None:
    house = House(drop_truncated=True)
    cut = rollout("student-0", (5, 6), finish=FinishReason.LENGTH, ordinal=0)
    gate = asyncio.Event()
    house.generators.script |= {(0, 0): cut, (0, 1): cut, (0, 2): gate}
    house.buffer.give(demand(0))
    run = asyncio.create_task(house.loop.run())
    await until(lambda: len(house.buffer.lost) == 2)
    await house.loop.restore(None, 0)
    house.buffer.lost.clear()
    house.generators.script = {(0, attempt): cut for attempt in range(MAX_REJECTED + 1)}
    house.buffer.expected = 1
    house.buffer.give(demand(0))
    await asyncio.wait_for(run, SOON)
    assert house.buffer.lost == [0] * MAX_REJECTED


@pytest.mark.parametrize(("published", "rewinds"), [(4, False), (5, True), (None, False)])
async def test_generators_go_back_only_if_they_hold_weights_that_no_longer_exist(
    published: int | None, rewinds: bool
) -> None:
    house = House()
    if published is not None:
        await house.loop.publish(weights(published))
        await until(lambda: f"weights {published}" in house.events)
    house.events.clear()
    await house.loop.restore(b"state", 4)
    assert house.events == (["rewind"] if rewinds else []) + ["restore to 4"]
    await house.loop.restore(b"state", 4)
    assert house.events.count("rewind") == rewinds, "once is enough"


# ---- clocks -------------------------------------------------------------------------------------


def test_a_busy_clock_counts_overlapping_work_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = BusyClock()
    with clock.running():
        now[0] += 2
        with clock.running():
            now[0] += 3
            assert clock.seconds == 5.0
        now[0] += 4
    now[0] += 50
    assert clock.seconds == 9.0
    with pytest.raises(KeyError), clock.running():
        now[0] += 1
        raise KeyError
    now[0] += 50
    assert clock.seconds == 10.0


async def test_waiting_for_nothing_is_not_counted_as_work() -> None:
    house = House()
    run = asyncio.create_task(house.loop.run())
    await asyncio.sleep(0.05)
    counters = house.loop.counters()
    assert (counters.generate_seconds, counters.score_seconds) == (0.0, 0.0)
    house.finish()
    await asyncio.wait_for(run, SOON)
