"""The orchestrator against a buffer, generators and scorers that are plain objects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest

from distillm_ray.cluster.busy_clock import BusyClock
from distillm_ray.cluster.device_turns import DeviceTurns
from distillm_ray.cluster.elastic_pool import PoolSize
from distillm_ray.cluster.orchestrator_loop import MAX_GIVEN_UP, Orchestrator
from distillm_ray.cluster.pool import ActorLost, InputGivenUp
from distillm_ray.config import FilterConfig, SamplingConfig
from distillm_ray.errors import ClusterError
from distillm_ray.log.records import Counters, EventRecord, Record
from distillm_ray.rollout.responses import MAX_REJECTED
from distillm_ray.teacher.target_library import LibraryCounters
from distillm_ray.teacher.target_store import StoreCounters
from distillm_ray.types import (
    BufferCounters,
    Demand,
    DrawFacts,
    FinishReason,
    Mix,
    Prompt,
    Rollout,
    Source,
    TrainStep,
    Weights,
    Work,
)
from tests import make

SOON = 5.0  # seconds; nothing here takes more than a few milliseconds
LOOPING = [7] * 40


def rollout(
    name: str,
    token_ids: Sequence[int] = (5, 9),
    *,
    finish: FinishReason = FinishReason.STOP,
    ordinal: int | None = None,
) -> Rollout:
    """The response to a demand; without an ordinal, a data-set sequence."""
    return make.rollout(
        name,
        prompt_id=f"p{ordinal}",
        response=token_ids,
        source=Source.DATASET if ordinal is None else Source.STUDENT,
        finish=finish,
        ordinal=ordinal,
    )


class FakeBuffer:
    """Hands out the work that a test gives it, and lost ordinals again, like the real buffer."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.todo: asyncio.Queue[Work] = asyncio.Queue()
        self.added: list[Rollout] = []
        self.lost: list[int] = []
        self.given_up: tuple[str, ...] = ()
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
        self.give(make.demand(ordinal, attempt=self.lost.count(ordinal)))

    async def give_up(self, ordinal: int, prompt_id: str) -> tuple[str, ...]:
        self.events.append(f"give up {prompt_id}")
        self.given_up = tuple(sorted({*self.given_up, prompt_id}))
        await self.lose(ordinal)
        return self.given_up

    async def restore(self, state: bytes | None, completed: int) -> int:
        self.incarnation += 1
        self.events.append(f"restore to {completed}")
        self.on_restore()
        await asyncio.sleep(0.01)  # the reply arrives later
        return self.incarnation


class FakeGenerators:
    """Responds by ordinal and attempt, from a script; by default at once with two tokens."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.script: dict[tuple[int, int], Any] = {}
        self.cancelled: list[int] = []
        self.follow: Any = None
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

    async def sleep(self) -> None:
        self.events.append("sleep")

    async def wake(self) -> None:
        self.events.append("wake")

    @property
    def size(self) -> PoolSize:
        return PoolSize(ready=3, starting=1)


class FakeTargets:
    """Counts two tokens for each sequence that is not stored yet."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.stored: set[str] = set()
        self.scoring = BusyClock()
        self.size = PoolSize(ready=2, starting=0)
        self.follow: Any = None

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


class Setup:
    """An orchestrator whose roles are fakes."""

    def __init__(self, *, teacher: bool = True, ranks: int = 0, **response_filter: bool) -> None:
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
            turns=DeviceTurns(ranks),
        )
        self.buffer.finish = self.finish

    def finish(self) -> None:
        """End the run."""
        self.finishing = asyncio.ensure_future(self.loop.finish())

    async def run_until(self, num_added: int) -> None:
        """Run until the buffer has this many rollouts and the loop has ended."""
        self.buffer.expected = num_added
        await asyncio.wait_for(self.loop.run(), SOON)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.001)


# ---- devices shared with the learners ------------------------------------------------------------


async def take(setup: Setup) -> None:
    assert await setup.loop.take_device(0, 0, hurried=False, timeout_s=SOON)
    setup.events.append("the learner has its device")


async def test_demand_probes_and_weights_wait_for_the_generators_turn() -> None:
    setup = Setup(ranks=1)
    await take(setup)
    running = asyncio.create_task(setup.run_until(1))
    setup.buffer.give(make.demand(0))
    await setup.loop.publish(make.weights(2))
    probe = asyncio.create_task(setup.loop.respond([make.prompt("x")], SamplingConfig(), 0))
    await asyncio.sleep(0.02)
    assert setup.events == ["sleep", "the learner has its device"]
    setup.loop.lend_device(0, 0)
    await probe
    await running
    assert setup.events[2] == "wake"
    assert set(setup.events[3:]) >= {"weights 2", "respond x", "add student-0"}


async def test_of_the_weights_of_one_turn_the_generators_take_the_newest_only() -> None:
    setup = Setup(ranks=1)
    await take(setup)
    for version in (1, 2, 3):
        await asyncio.wait_for(setup.loop.publish(make.weights(version)), SOON)
    setup.loop.lend_device(0, 0)
    await until(lambda: "weights 3" in setup.events)
    await take(setup)
    assert setup.events[2:] == ["wake", "weights 3", "sleep", "the learner has its device"]


async def test_the_last_weights_arrive_when_the_learners_have_ended_in_their_turn() -> None:
    setup = Setup(ranks=1)
    running = asyncio.create_task(setup.loop.run())
    await take(setup)
    await setup.loop.publish(make.weights(9))
    await setup.loop.finish()
    await asyncio.wait_for(running, SOON)
    assert setup.events[-2:] == ["wake", "weights 9"]


async def test_a_restore_to_an_older_checkpoint_goes_on_when_the_learner_has_lent() -> None:
    setup = Setup(ranks=1)
    await take(setup)
    await setup.loop.publish(make.weights(4))
    setup.loop.lend_device(0, 0)
    await asyncio.wait_for(setup.loop.restore(b"", 2), SOON)
    assert "rewind" in setup.events
    await take(setup)


# ---- elastic pools -------------------------------------------------------------------------------


async def test_pools_follow_the_wait_of_the_learners_while_it_works_and_through_a_restore() -> None:
    setup = Setup()
    seen: list[float] = []

    async def follow(waited: Callable[[], Awaitable[float]]) -> None:
        try:
            while True:
                seen.append(await waited())
                await asyncio.sleep(0)
        finally:
            setup.events.append("ended")

    setup.generators.follow = setup.targets.follow = follow
    setup.loop._waited = AsyncMock(return_value=2.5)
    run = asyncio.create_task(setup.loop.run())
    await until(lambda: len(seen) > 4)
    await setup.loop.restore(None, 0)
    before = len(seen)
    await until(lambda: len(seen) > before + 4)
    await setup.loop.finish()
    await asyncio.wait_for(run, SOON)
    assert set(seen) == {2.5}
    assert setup.events.count("ended") == 2


async def test_a_pool_that_cannot_follow_ends_the_run() -> None:
    setup = Setup()
    setup.generators.follow = setup.targets.follow = AsyncMock(side_effect=ClusterError("silent"))
    setup.loop._waited = AsyncMock(return_value=0.0)
    with pytest.raises(ClusterError, match="silent"):
        await asyncio.wait_for(setup.loop.run(), SOON)


# ---- ordinals -----------------------------------------------------------------------------------


async def test_a_rollout_is_shelved_only_after_its_targets_are_stored() -> None:
    setup = Setup()
    setup.buffer.give(make.demand(0), make.demand(1))
    await setup.run_until(2)
    for name in ("student-0", "student-1"):
        assert setup.events.index(f"score {name}") < setup.events.index(f"add {name}")


async def test_a_slow_response_does_not_delay_the_others() -> None:
    setup = Setup()
    gate = setup.generators.script[0, 0] = asyncio.Event()
    setup.buffer.give(make.demand(0), make.demand(1), make.demand(2))
    setup.buffer.expected = 3
    run = asyncio.create_task(setup.loop.run())
    await until(lambda: len(setup.buffer.added) == 2)
    assert {one.ordinal for one in setup.buffer.added} == {1, 2}
    gate.set()
    await asyncio.wait_for(run, SOON)
    assert [one.ordinal for one in setup.buffer.added][-1] == 0


async def test_a_lost_ordinal_is_generated_again_and_named_in_the_log() -> None:
    setup = Setup()
    setup.generators.script[0, 0] = ActorLost("generator 1: it died")
    setup.generators.script[0, 1] = ActorLost("generator 0: it died")
    setup.buffer.give(make.demand(0))
    await setup.run_until(1)
    assert setup.buffer.lost == [0, 0]
    assert setup.buffer.added[0].response_ids.tolist() == [2 + 3, 9]  # the third attempt
    details = [record.detail for record in setup.log.records if isinstance(record, EventRecord)]
    assert details == ["generator 1: it died", "generator 0: it died"]
    assert setup.loop.counters().lost == 2


def of_prompt(ordinal: int, name: str) -> Demand:
    return make.demand(ordinal, of=make.prompt(name))


async def test_a_prompt_that_is_given_up_is_named_and_counted_once_for_all_its_ordinals() -> None:
    setup = Setup()
    for ordinal in (0, 1):
        setup.generators.script[ordinal, 0] = InputGivenUp("prompt p7: three failed at it")
    setup.buffer.give(of_prompt(0, "p7"), of_prompt(1, "p7"))
    await setup.run_until(2)
    assert sorted(one.ordinal or 0 for one in setup.buffer.added) == [0, 1]
    assert [event for event in setup.events if "give up" in event] == ["give up p7"] * 2
    events = [record for record in setup.log.records if isinstance(record, EventRecord)]
    assert [(event.name, event.detail) for event in events] == [
        ("prompt given up", "prompt p7: three failed at it")
    ]
    assert setup.loop.counters().given_up == 1


async def test_too_many_prompts_that_are_given_up_end_the_run_with_their_names() -> None:
    setup = Setup()
    ordinals = range(MAX_GIVEN_UP + 1)
    for ordinal in ordinals:
        setup.generators.script[ordinal, 0] = InputGivenUp(f"prompt p{ordinal}: they failed")
    setup.buffer.give(*(of_prompt(ordinal, f"p{ordinal}") for ordinal in ordinals))
    with pytest.raises(ClusterError, match=r"at most 8 prompts .*, got p0, p1, .*, p8: the engi"):
        await setup.run_until(MAX_GIVEN_UP + 1)


async def test_prompts_that_were_given_up_before_a_restart_count() -> None:
    setup = Setup()
    setup.buffer.given_up = tuple(f"old{number}" for number in range(MAX_GIVEN_UP))
    setup.generators.script[0, 0] = InputGivenUp("prompt p0: they failed")
    setup.buffer.give(of_prompt(0, "p0"))
    with pytest.raises(ClusterError, match=r"at most 8 prompts .*, got old0, .*, p0: the engi"):
        await setup.run_until(1)


async def test_without_a_teacher_nothing_is_scored() -> None:
    setup = Setup(teacher=False)
    setup.buffer.give(make.demand(0), dataset=[rollout("dataset-0")])
    await setup.run_until(1)
    assert setup.events == ["add student-0"]


async def test_data_set_sequences_are_scored_once() -> None:
    setup = Setup()
    setup.targets.stored.add("dataset-0")
    setup.buffer.give(make.demand(0), dataset=[rollout("dataset-0"), rollout("dataset-1")])
    run = asyncio.create_task(setup.loop.run())
    await until(lambda: setup.loop.counters().scored_sequences == 2)
    setup.finish()
    await asyncio.wait_for(run, SOON)
    assert sorted(event for event in setup.events if event.startswith("score")) == [
        "score dataset-1",
        "score student-0",
    ]
    assert setup.loop.counters().scored_tokens == 4


# ---- the filter ---------------------------------------------------------------------------------


async def test_a_rejected_response_is_generated_again() -> None:
    setup = Setup(drop_looping=True)
    setup.generators.script[0, 0] = rollout("student-0", LOOPING, ordinal=0)
    setup.buffer.give(make.demand(0))
    await setup.run_until(1)
    assert setup.buffer.added[0].response_ids.tolist() == [4, 9]
    counters = setup.loop.counters()
    assert (counters.dropped, counters.looping, counters.generated_sequences) == (1, 1, 2)
    assert setup.events == ["score student-0", "add student-0"]


async def test_after_the_last_rejection_the_slot_takes_any_response() -> None:
    setup = Setup(drop_truncated=True)
    cut = rollout("student-0", (5, 6), finish=FinishReason.LENGTH, ordinal=0)
    for attempt in range(MAX_REJECTED + 1):
        setup.generators.script[0, attempt] = cut
    setup.buffer.give(make.demand(0))
    await setup.run_until(1)
    assert setup.buffer.added == [cut]
    assert setup.buffer.lost == [0] * MAX_REJECTED
    counters = setup.loop.counters()
    assert (counters.dropped, counters.truncated) == (MAX_REJECTED, MAX_REJECTED + 1)


async def test_rejections_of_one_ordinal_do_not_count_for_another() -> None:
    setup = Setup(drop_truncated=True)
    for ordinal in (0, 1):
        for attempt in range(MAX_REJECTED):
            setup.generators.script[ordinal, attempt] = rollout(
                f"student-{ordinal}", (5, 6), finish=FinishReason.LENGTH, ordinal=ordinal
            )
    setup.buffer.give(make.demand(0), make.demand(1))
    await setup.run_until(2)
    assert all(one.finish_reason is FinishReason.STOP for one in setup.buffer.added)


async def test_responses_that_the_filter_keeps_are_counted_too() -> None:
    setup = Setup()
    setup.generators.script[0, 0] = rollout("student-0", LOOPING, ordinal=0)
    setup.generators.script[1, 0] = rollout(
        "student-1", (5, 6, 7), finish=FinishReason.LENGTH, ordinal=1
    )
    setup.generators.script[2, 0] = rollout("student-2", (9,), ordinal=2)
    setup.buffer.give(make.demand(0), make.demand(1), make.demand(2))
    await setup.run_until(3)
    counters = setup.loop.counters()
    assert (counters.looping, counters.truncated, counters.empty) == (1, 1, 1)
    assert counters.generated_tokens == len(LOOPING) + 3 + 1
    assert (counters.dropped, counters.lost) == (0, 0)


# ---- failures -----------------------------------------------------------------------------------


async def test_a_failing_task_ends_the_run_with_its_own_error_and_cancels_the_rest() -> None:
    setup = Setup()
    setup.generators.script[0, 0] = asyncio.Event()
    setup.generators.script[1, 0] = ZeroDivisionError("of a task")
    setup.buffer.give(make.demand(0), make.demand(1))
    with pytest.raises(ZeroDivisionError, match="of a task"):
        await asyncio.wait_for(setup.loop.run(), SOON)
    assert setup.generators.cancelled == [0]
    assert setup.buffer.added == []


async def test_an_update_that_fails_ends_the_run() -> None:
    setup = Setup()
    setup.generators.update_error = RuntimeError("no weights")
    run = asyncio.create_task(setup.loop.run())
    await setup.loop.publish(make.weights(1))
    with pytest.raises(RuntimeError, match="no weights"):
        await asyncio.wait_for(run, SOON)


# ---- weights ------------------------------------------------------------------------------------


async def test_publishing_returns_before_the_weights_have_arrived() -> None:
    setup = Setup()
    setup.generators.update_gate.clear()
    await asyncio.wait_for(setup.loop.publish(make.weights(1)), SOON)
    assert setup.events == []
    setup.generators.update_gate.set()
    await setup.loop.publish(make.weights(2))  # waits for the first one
    assert setup.events == ["weights 1"]
    await until(lambda: setup.events == ["weights 1", "weights 2"])
    assert setup.loop.counters().sync_seconds == 1.0


async def test_responses_come_from_the_weights_published_last() -> None:
    setup = Setup()
    setup.generators.update_gate.clear()
    await setup.loop.publish(make.weights(1))
    responses = asyncio.create_task(
        setup.loop.respond([make.prompt("p3"), make.prompt("p1")], SamplingConfig(), 6)
    )
    await asyncio.sleep(0.01)
    assert setup.events == []
    setup.generators.update_gate.set()
    got = await asyncio.wait_for(responses, SOON)
    assert setup.events == ["weights 1", "respond p3", "respond p1"]
    assert [one.rollout_id for one in got] == ["response-p3", "response-p1"]
    counters = setup.loop.counters()
    assert (counters.generated_tokens, counters.probe_tokens) == (0, 6)  # not to be trained on


async def test_the_run_ends_after_the_last_weights_have_arrived() -> None:
    """They are evaluated next."""
    setup = Setup()
    setup.generators.update_gate.clear()
    run = asyncio.create_task(setup.loop.run())
    await setup.loop.publish(make.weights(9))
    setup.finish()
    await asyncio.sleep(0.01)
    assert not run.done()
    setup.generators.update_gate.set()
    await asyncio.wait_for(run, SOON)
    assert setup.events == ["weights 9"]


# ---- restore ------------------------------------------------------------------------------------


async def test_a_restore_cancels_running_tasks_and_continues_with_new_work() -> None:
    setup = Setup()
    setup.generators.script[0, 0] = asyncio.Event()
    setup.buffer.give(make.demand(0))
    run = asyncio.create_task(setup.loop.run())
    await asyncio.sleep(0.01)
    await setup.loop.restore(b"state", 4)
    assert setup.generators.cancelled == [0]
    setup.buffer.expected = 1
    setup.buffer.give(make.demand(1))
    await asyncio.wait_for(run, SOON)
    assert [one.ordinal for one in setup.buffer.added] == [1]


async def test_work_from_before_a_restore_is_ignored_and_work_from_after_it_is_done() -> None:
    """The old work arrives during the restore, the new work before the reply to it."""
    setup = Setup()
    setup.buffer.expected = 1
    run = asyncio.create_task(setup.loop.run())

    def arrive() -> None:
        setup.buffer.todo.put_nowait(Work(incarnation=0, demand=(make.demand(7),), dataset=()))
        setup.buffer.give(make.demand(8))

    setup.buffer.on_restore = arrive
    await setup.loop.restore(None, 0)
    await asyncio.wait_for(run, SOON)
    assert [one.ordinal for one in setup.buffer.added] == [8]


async def test_a_restore_resets_the_count_of_rejections() -> None:
    setup = Setup(drop_truncated=True)
    cut = rollout("student-0", (5, 6), finish=FinishReason.LENGTH, ordinal=0)
    gate = asyncio.Event()
    setup.generators.script |= {(0, 0): cut, (0, 1): cut, (0, 2): gate}
    setup.buffer.give(make.demand(0))
    run = asyncio.create_task(setup.loop.run())
    await until(lambda: len(setup.buffer.lost) == 2)
    await setup.loop.restore(None, 0)
    setup.buffer.lost.clear()
    setup.generators.script = {(0, attempt): cut for attempt in range(MAX_REJECTED + 1)}
    setup.buffer.expected = 1
    setup.buffer.give(make.demand(0))
    await asyncio.wait_for(run, SOON)
    assert setup.buffer.lost == [0] * MAX_REJECTED


@pytest.mark.parametrize(("published", "rewinds"), [(4, False), (5, True), (None, False)])
async def test_generators_are_rewound_only_if_they_hold_weights_that_no_longer_exist(
    published: int | None, rewinds: bool
) -> None:
    setup = Setup()
    if published is not None:
        await setup.loop.publish(make.weights(published))
        await until(lambda: f"weights {published}" in setup.events)
    setup.events.clear()
    await setup.loop.restore(b"state", 4)
    assert setup.events == (["rewind"] if rewinds else []) + ["restore to 4"]
    await setup.loop.restore(b"state", 4)
    assert setup.events.count("rewind") == rewinds, "once is enough"


# ---- the log of a step --------------------------------------------------------------------------


async def test_a_step_records_what_the_libraries_of_all_stores_gave_and_their_warnings() -> None:
    setup = Setup()
    stores = [
        StoreCounters(
            nbytes=10,
            evictions=1,
            library=LibraryCounters(sequences=2, tokens=20, seconds=0.5),
            warnings=("a shard is damaged",),
        ),
        StoreCounters(
            nbytes=5, evictions=0, library=LibraryCounters(sequences=1, tokens=7, seconds=0.25)
        ),
    ]
    empty = BufferCounters(fresh=0, replay=0, outstanding=0, demanded=0, duplicates=0, late=0)
    setup.targets.counters = AsyncMock(return_value=stores)  # type: ignore[attr-defined]
    setup.buffer.counters = AsyncMock(return_value=empty)  # type: ignore[attr-defined]
    facts = DrawFacts(phi=0.0, psi=0.0, mix=Mix(dataset=3))
    before = Counters(library_sequences=1, library_tokens=6, library_seconds=0.25)
    step, now = await setup.loop.step_record(TrainStep(step=1, loss=1.0), facts, since=before)
    work = step.work
    assert (work.library_sequences, work.library_tokens, work.library_seconds) == (2, 21, 0.5)
    assert now.library_sequences == 3
    assert [
        (one.name, one.detail) for one in setup.log.records if isinstance(one, EventRecord)
    ] == [("target library", "a shard is damaged")]


# ---- clocks -------------------------------------------------------------------------------------


def test_a_busy_clock_counts_overlapping_work_once() -> None:
    now = [100.0]
    clock = BusyClock(lambda: now[0])
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


async def test_an_idle_loop_counts_no_seconds_of_work() -> None:
    setup = Setup()
    run = asyncio.create_task(setup.loop.run())
    await asyncio.sleep(0.05)
    counters = setup.loop.counters()
    assert (counters.generate_seconds, counters.score_seconds) == (0.0, 0.0)
    setup.finish()
    await asyncio.wait_for(run, SOON)
