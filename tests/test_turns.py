"""Who has the shared devices: the state machine alone, then carried out with recorders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm_ray.cluster.device_turns import DeviceTurns
from distillm_ray.cluster.turns import Engines, Turns
from distillm_ray.errors import ClusterError

SOON = 5.0  # seconds; nothing here takes more than a few milliseconds


# ---- the state machine ---------------------------------------------------------------------------


def test_the_generators_begin_and_the_learners_wait_for_their_work_and_their_sleep() -> None:
    turns = Turns.of(ranks=1).arrives()
    assert turns.admits
    turns = turns.enters().asks(rank=0)
    assert (turns.granted(0), turns.engines) == (False, Engines.AWAKE)
    turns = turns.leaves()
    assert (turns.granted(0), turns.engines) == (False, Engines.FALLING_ASLEEP)
    assert turns.slept().granted(0)


def test_work_that_came_while_the_learners_asked_is_done_first() -> None:
    turns = Turns.of(ranks=1).arrives().enters().asks(rank=0).arrives()
    assert turns.leaves().engines is Engines.AWAKE
    assert turns.admits
    assert turns.enters().leaves().leaves().engines is Engines.FALLING_ASLEEP


def test_a_rank_that_is_in_a_hurry_waits_only_for_work_that_has_begun() -> None:
    turns = Turns.of(ranks=1).arrives().enters().arrives().asks(rank=0, hurried=True)
    assert not turns.admits
    turns = turns.leaves()
    assert turns.engines is Engines.FALLING_ASLEEP
    turns = turns.slept()
    assert turns.granted(0)
    turns = turns.lends(rank=0).woke()
    assert turns.admits, "the hurry ends with the turn"


def test_engines_that_nothing_needs_stay_asleep() -> None:
    turns = Turns.of(ranks=1).asks(rank=0).slept().lends(rank=0)
    assert (turns.learners_hold, turns.engines) == (False, Engines.ASLEEP)
    assert turns.asks(rank=0).granted(0), "without a wake in between"


def test_all_ranks_must_ask_and_all_must_lend() -> None:
    turns = Turns.of(ranks=2).asks(rank=0)
    assert turns.engines is Engines.AWAKE
    turns = turns.asks(rank=1).slept()
    assert (turns.granted(0), turns.granted(1)) == (True, True)
    turns = turns.arrives().lends(rank=1)
    assert (turns.granted(0), turns.granted(1)) == (True, False)
    assert turns.engines is Engines.ASLEEP, "rank 0 still uses its device"
    assert turns.lends(rank=0).engines is Engines.WAKING


def test_a_rank_may_lend_and_ask_again_before_another_one_has_lent() -> None:
    turns = Turns.of(ranks=2).asks(rank=0).asks(rank=1).slept().arrives()
    turns = turns.lends(rank=1).asks(rank=1)
    assert (turns.granted(0), turns.granted(1)) == (True, False)
    turns = turns.lends(rank=0)
    assert turns.engines is Engines.WAKING, "the generators' turn is not lost"
    turns = turns.woke().enters().asks(rank=0).leaves().slept()
    assert (turns.granted(0), turns.granted(1)) == (True, True)


def test_the_successors_of_ranks_that_died_in_their_turn_have_it() -> None:
    dead = Turns.of(ranks=2).asks(rank=0).asks(rank=1).slept().lends(rank=0)
    turns = dead.asks(rank=1, attempt=1)
    assert (turns.granted(0), turns.granted(1)) == (False, True)
    turns = turns.asks(rank=0, attempt=1)
    assert turns.granted(0)
    assert turns.lends(rank=0, attempt=0) == turns, "a late call of the dead"


def test_the_successors_of_ranks_that_died_while_they_asked_ask_anew() -> None:
    dead = Turns.of(ranks=2).arrives().enters().asks(rank=0)
    turns = dead.asks(rank=1, attempt=1).leaves()
    assert turns.engines is Engines.AWAKE, "the new rank 0 has not asked"
    assert turns.asks(rank=0, attempt=1).slept().granted(1)


@pytest.mark.parametrize("lent", [False, True])
def test_after_the_learners_all_turns_are_the_generators(lent: bool) -> None:
    turns = Turns.of(ranks=1).asks(rank=0).slept().arrives()
    turns = turns.lends(rank=0).ended() if lent else turns.ended()
    turns = turns.woke().enters().leaves()
    assert (turns.learners_hold, turns.engines) == (False, Engines.AWAKE)


def possible(turns: Turns, attempt: int) -> dict[str, Callable[[], Turns]]:
    """What can happen next: ranks and generators do what their loops do."""
    events: dict[str, Callable[[], Turns]] = {"arrives": turns.arrives}
    if turns.waiting:
        events["withdraws"] = turns.withdraws
        if turns.admits:
            events["enters"] = turns.enters
    if turns.running:
        events["leaves"] = turns.leaves
    if turns.engines is Engines.FALLING_ASLEEP:
        events["slept"] = turns.slept
    if turns.engines is Engines.WAKING:
        events["woke"] = turns.woke
    for rank, position in enumerate(turns.positions):
        if turns.granted(rank):
            events[f"lends {rank}"] = lambda rank=rank: turns.lends(rank=rank, attempt=attempt)
        elif position % 2 == 0 or turns.attempt < attempt:
            events[f"asks {rank}"] = lambda rank=rank: turns.asks(rank=rank, attempt=attempt)
            events[f"hurries {rank}"] = lambda rank=rank: turns.asks(
                rank=rank, attempt=attempt, hurried=True
            )
    return events


def check(turns: Turns) -> None:
    if turns.learners_hold:
        assert turns.engines is Engines.ASLEEP
        assert turns.running == 0
    if turns.running:
        assert turns.engines is Engines.AWAKE


@settings(max_examples=100)
@given(st.data(), st.integers(1, 3))
def test_no_sequence_of_events_leaves_both_awake_or_anybody_waiting_forever(
    data: st.DataObject, ranks: int
) -> None:
    turns, attempt = Turns.of(ranks=ranks), 0
    for _ in range(data.draw(st.integers(0, 40))):
        events = possible(turns, attempt)
        name = data.draw(st.sampled_from([*sorted(events), "group dies"]))
        if name == "group dies":
            attempt += 1
            continue
        turns = events[name]()
        check(turns)

    # From here on all go on as their loops do: work ends, and ranks ask, have their turn, and lend.
    had_their_turn: set[int] = set()
    for _ in range(200):
        if not turns.waiting and not turns.running and len(had_their_turn) == ranks:
            break
        events = possible(turns, attempt)
        had_their_turn |= {rank for rank in range(ranks) if turns.granted(rank)}
        able = [
            name
            for name in sorted(events)
            if name.split()[0] in ("enters", "leaves", "slept", "woke", "asks", "lends")
        ]
        assert able, f"everybody waits: {turns}"
        turns = events[data.draw(st.sampled_from(able))]()
        check(turns)
    else:
        pytest.fail(f"somebody still waits: {turns}")


# ---- carried out ---------------------------------------------------------------------------------


class Recorder:
    """Engines that record when they sleep and wake, and what is done meanwhile."""

    def __init__(self, ranks: int = 1) -> None:
        self.events: list[str] = []
        self.turns = DeviceTurns(ranks)
        self.turns.control(self.sleep, self.wake)

    async def sleep(self) -> None:
        self.events.append("falling asleep")
        await asyncio.sleep(0.005)
        self.events.append("asleep")

    async def wake(self) -> None:
        self.events.append("waking")
        await asyncio.sleep(0.005)
        self.events.append("awake")

    async def work(self, name: str, until: asyncio.Event | None = None) -> None:
        async with self.turns.working():
            self.events.append(f"{name} begins")
            if until is not None:
                await until.wait()
            self.events.append(f"{name} ends")

    async def take(self, rank: int = 0, *, hurried: bool = False) -> None:
        assert await self.turns.take(0, rank, hurried=hurried, timeout_s=SOON)
        self.events.append(f"rank {rank} has its device")

    def lend(self, rank: int = 0) -> None:
        self.events.append(f"rank {rank} lends")
        self.turns.lend(0, rank)


async def test_engines_sleep_before_the_learners_begin_and_wake_before_work_does() -> None:
    devices = Recorder()
    responded = asyncio.Event()
    response = asyncio.create_task(devices.work("response", responded))
    await asyncio.sleep(0)
    taking = asyncio.create_task(devices.take())
    await asyncio.sleep(0.01)
    responded.set()
    await taking
    update = asyncio.create_task(devices.work("update"))
    await asyncio.sleep(0.01)
    devices.lend()
    await asyncio.gather(response, update)
    assert devices.events == [
        *("response begins", "response ends", "falling asleep", "asleep", "rank 0 has its device"),
        *("rank 0 lends", "waking", "awake", "update begins", "update ends"),
    ]


async def test_a_rank_that_does_not_get_its_device_in_time_may_ask_again() -> None:
    devices = Recorder()
    responded = asyncio.Event()
    response = asyncio.create_task(devices.work("response", responded))
    await asyncio.sleep(0)
    assert not await devices.turns.take(0, 0, hurried=False, timeout_s=0.01)
    responded.set()
    await devices.take()
    await response


async def test_work_that_is_cancelled_in_line_or_midway_leaves_nothing_behind() -> None:
    devices = Recorder()
    midway = asyncio.create_task(devices.work("midway", asyncio.Event()))
    await asyncio.sleep(0)
    taking = asyncio.create_task(devices.take())
    await asyncio.sleep(0.01)
    midway.cancel()
    await taking
    in_line = asyncio.create_task(devices.work("in line"))
    await asyncio.sleep(0.01)
    in_line.cancel()
    await asyncio.gather(midway, in_line, return_exceptions=True)
    devices.lend()
    await devices.take()
    assert "waking" not in devices.events


async def test_the_end_of_the_learners_wakes_the_engines_for_what_waits() -> None:
    devices = Recorder()
    await devices.take()
    update = asyncio.create_task(devices.work("last update"))
    await asyncio.sleep(0.01)
    devices.turns.end()
    await asyncio.wait_for(update, SOON)


async def test_engines_that_cannot_sleep_fail_all_who_wait() -> None:
    devices = Recorder()

    async def fail() -> None:
        raise ClusterError("1 of 2 generators are left")

    devices.turns.control(fail, devices.wake)
    with pytest.raises(ClusterError, match="1 of 2 generators"):
        await devices.take()
    with pytest.raises(ClusterError, match="1 of 2 generators"):
        await devices.work("response")


async def test_without_ranks_nothing_waits_and_nothing_sleeps() -> None:
    devices = Recorder(ranks=0)
    await devices.work("response")
    assert devices.events == ["response begins", "response ends"]
