"""The pool's line of waiting calls, over handles that are plain objects: what each release wakes.

What happens when actors die is in tests/integration/test_generator_pool.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
from ray.exceptions import RayError

from distillm_ray.cluster import pool as pool_module
from distillm_ray.cluster.member import MAX_FAILURES, Member
from distillm_ray.cluster.pool import ActorLost, ActorPool, InputGivenUp
from distillm_ray.cluster.suspects import MAX_ALONE, MAX_SHARED
from distillm_ray.errors import ClusterError, ModelError, UserError
from tests.integration.actors import Events


class CountedEvent(asyncio.Event):
    """Counts how often somebody looks whether the member is ready."""

    looks = 0

    def is_set(self) -> bool:
        self.looks += 1
        return super().is_set()


class Calls:
    """Calls of a pool that end when a test ends them."""

    def __init__(self, num_members: int = 1, *, max_in_flight: int = 1) -> None:
        self.pool: ActorPool[Any] = ActorPool(
            cast(Any, [object() for _ in range(num_members)]),
            role="generator",
            max_in_flight=max_in_flight,
            stall_timeout_s=60.0,
            startup_timeout_s=60.0,
            log=cast(Any, None),
        )
        self.members = self.pool._members
        for member in self.members:
            member.ready = CountedEvent()
            member.ready.set()
        self.running: dict[int, asyncio.Future[int]] = {}
        self.order: list[int] = []  # in which the calls began to run
        self.tasks: list[asyncio.Task[int]] = []

    async def make(self, count: int) -> None:
        """Make so many more calls, numbered from 0."""
        first = len(self.tasks)
        numbers = range(first, first + count)
        self.tasks += [
            asyncio.create_task(self.pool.call(f"input {index}", self._run(index)))
            for index in numbers
        ]
        await settle()

    def _run(self, number: int) -> Callable[[Any], asyncio.Future[int]]:
        def invoke(_: Any) -> asyncio.Future[int]:
            self.order.append(number)
            self.running[number] = asyncio.get_running_loop().create_future()
            return self.running[number]

        return invoke

    async def end(self, number: int) -> None:
        self.running.pop(number).set_result(number)
        await settle()

    @property
    def looks(self) -> int:
        return sum(cast(CountedEvent, member.ready).looks for member in self.members)


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


async def test_a_release_starts_the_call_that_waited_longest_and_no_other() -> None:
    calls = Calls()
    await calls.make(100)
    assert calls.order == [0]
    for number in range(99):
        await calls.end(number)
        assert calls.order == list(range(number + 2))


async def test_a_release_costs_the_same_work_however_many_calls_wait() -> None:
    async def looks_of(waiting: int) -> int:
        calls = Calls(num_members=2)
        await calls.make(2 + waiting)
        before = calls.looks
        for number in range(20):
            await calls.end(number)
        return calls.looks - before

    # At each member for the call that comes next, and for the one after it.
    assert await looks_of(30) == await looks_of(1000) == 20 * 2 * 2


async def test_a_call_that_is_cancelled_while_it_waits_is_passed_over() -> None:
    calls = Calls()
    await calls.make(4)
    calls.tasks[1].cancel()
    await settle()
    await calls.end(0)
    assert calls.order == [0, 2]


async def test_a_call_that_is_cancelled_with_its_place_in_hand_passes_it_on() -> None:
    calls = Calls()
    await calls.make(3)
    calls.pool._places.release(calls.members[0])  # hands the place of call 0 to call 1
    calls.tasks[1].cancel()  # before it could run
    await settle()
    assert calls.order == [0, 2]
    assert calls.members[0].in_flight == 1


async def test_a_call_whose_member_was_killed_meanwhile_stays_the_first_in_line() -> None:
    calls = Calls()
    [member] = calls.members
    await calls.make(3)
    calls.pool._places.release(member)
    member.ready.clear()  # killed before call 1 could run
    member.life += 1
    await settle()
    assert (calls.order, member.in_flight) == ([0], 0)
    member.ready.set()
    calls.pool._places.hand_out()
    await settle()
    assert calls.order == [0, 1]


async def test_a_member_that_gets_ready_takes_as_many_calls_as_it_has_places() -> None:
    calls = Calls(max_in_flight=3)
    [member] = calls.members
    member.ready.clear()
    await calls.make(10)
    member.ready.set()
    calls.pool._places.hand_out()
    await settle()
    assert (calls.order, member.in_flight) == ([0, 1, 2], 3)


async def test_giving_up_ends_all_calls_that_wait_and_those_that_come_later() -> None:
    calls = Calls()
    await calls.make(3)
    calls.tasks[1].cancel()
    calls.pool._places.give_up(ClusterError("it failed too often"))
    await calls.make(1)
    for task in (calls.tasks[2], calls.tasks[3]):
        with pytest.raises(ClusterError, match="it failed too often"):
            await task
    await calls.end(0)
    assert await calls.tasks[0] == 0


# ---- degraded operation --------------------------------------------------------------------------


class Degraded:
    """A pool whose starts and calls fail as a test says, without any process."""

    def __init__(
        self, num_members: int, monkeypatch: pytest.MonkeyPatch, *, min_actors: int = 1
    ) -> None:
        monkeypatch.setattr(pool_module, "kill", lambda handle, no_restart: None)
        monkeypatch.setattr(pool_module, "_FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr(pool_module, "_LONGEST_PAUSE_S", 0.04)
        self.log = Events()
        self.starts: list[str] = []
        self.failing: dict[str, UserError] = {}  # whose start fails, by name
        self.broken: set[str] = set()  # whose calls fail, by name
        self.calls = 0
        self.pool: ActorPool[Any] = ActorPool(
            cast(Any, [f"generator {index}" for index in range(num_members)]),
            role="generator",
            max_in_flight=1,
            stall_timeout_s=60.0,
            startup_timeout_s=60.0,
            log=cast(Any, self.log),
            min_actors=min_actors,
        )
        for member in self.pool._members:
            member.ready.set()
        monkeypatch.setattr(self.pool, "_start", self._start)

    async def _start(self, member: Member[Any]) -> None:
        self.starts.append(member.name)
        await asyncio.sleep(0)
        if member.name in self.failing:
            raise self.failing[member.name]
        member.ready.set()
        self.pool._places.hand_out()

    async def call(self) -> str:
        """The name of the member that replied."""

        async def reply(name: str) -> str:
            await asyncio.sleep(0)
            if name in self.broken:
                raise RayError("broken")
            return name

        self.calls += 1
        return await asyncio.wait_for(self.pool.call(f"input {self.calls}", cast(Any, reply)), 5)

    async def lose(self, name: str) -> None:
        """Make that member fail one call."""
        self.broken.add(name)
        with pytest.raises(ActorLost):
            while True:
                await asyncio.gather(*(self.call() for _ in self.pool._members))
        self.broken.discard(name)


async def test_a_replacement_that_finds_no_room_leaves_the_others_working_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Degraded(3, monkeypatch)
    pool.failing["generator 0"] = ClusterError("generator 0 was not ready: no room")
    await pool.lose("generator 0")
    for _ in range(20):
        assert await pool.call() in ("generator 1", "generator 2")
        await asyncio.sleep(0.01)
    assert pool.starts.count("generator 0") >= 3
    assert pool.log.names[:2] == ["generator 0 failed", "generator 0 is missing"]
    assert pool.log.details[1] == (
        "generator 0 was not ready: no room; 2 of 3 generators are left, and it is tried again"
    )
    pool.failing.clear()
    async with asyncio.timeout(5):
        while pool.log.names[-1] != "generator 0 is back":
            await asyncio.sleep(0.01)
    assert set(await asyncio.gather(*(pool.call() for _ in range(3)))) == {
        *("generator 0", "generator 1", "generator 2")
    }


async def test_a_pool_with_fewer_members_than_its_minimum_ends_the_run_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Degraded(3, monkeypatch, min_actors=2)
    for name in ("generator 0", "generator 1"):
        pool.failing[name] = ModelError(f"{name}: its disk is gone")
    await pool.lose("generator 0")
    await asyncio.sleep(0.05)
    assert await pool.call() in ("generator 1", "generator 2"), "two are left"
    await pool.lose("generator 1")
    await asyncio.sleep(0.05)
    with pytest.raises(
        ClusterError, match=r"disk is gone; 1 of 3 generators are left, min_actors = 2$"
    ):
        await pool.call()


async def test_a_member_that_fails_again_and_again_is_missing_until_it_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Degraded(2, monkeypatch)
    pool.broken.add("generator 0")
    lost = 0
    while lost < MAX_FAILURES:
        results = await asyncio.gather(*(pool.call() for _ in range(2)), return_exceptions=True)
        lost += sum(isinstance(one, ActorLost) for one in results)
        await asyncio.sleep(0.001)
    assert "generator 0 is missing" in pool.log.names
    assert await pool.call() == "generator 1"
    pool.broken.clear()
    async with asyncio.timeout(5):
        while "generator 0" not in await asyncio.gather(*(pool.call() for _ in range(2))):
            await asyncio.sleep(0.01)
    assert not pool.pool._members[0].missing


async def test_members_that_all_fail_again_and_again_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Degraded(2, monkeypatch)
    pool.broken |= {"generator 0", "generator 1"}
    with pytest.raises(ClusterError, match=r"times in a row.*; 0 of 2 generators are left"):
        async with asyncio.timeout(5):
            while True:
                with contextlib.suppress(ActorLost):
                    await pool.call()


async def test_a_rewind_goes_on_with_the_members_that_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Degraded(2, monkeypatch)
    pool.failing["generator 1"] = ClusterError("generator 1 was not ready")
    await pool.pool.restart()
    assert await pool.call() == "generator 0"
    pool.failing["generator 0"] = ClusterError("generator 0 was not ready")
    with pytest.raises(ClusterError, match=r"0 of 2 generators are left, min_actors = 1$"):
        await pool.pool.restart()


# ---- inputs at which members fail ----------------------------------------------------------------


class Poisoned(Degraded):
    """A member with a poisonous call dies of it with all its other calls."""

    ticks = 10  # that a call takes

    def __init__(
        self,
        num_members: int,
        monkeypatch: pytest.MonkeyPatch,
        *,
        poison: set[str],
        max_in_flight: int,
    ) -> None:
        super().__init__(num_members, monkeypatch)
        self.poison = poison
        self.pool._places.max_in_flight = max_in_flight
        self.crash = {member.handle: asyncio.Event() for member in self.pool._members}
        self.in_flight: dict[str, list[str]] = {str(handle): [] for handle in self.crash}
        self.died_with: list[int] = []  # the calls in flight at each failure
        self.beside: dict[str, int] = {}  # the most calls that an input last had beside it

    async def until_done(self, name: str) -> bool:
        """Whether the input succeeded, or was given up."""
        while True:
            try:
                await self.pool.call(name, cast(Any, lambda handle: self._reply(handle, name)))
            except ActorLost:
                await asyncio.sleep(0)
            except InputGivenUp:
                return False
            else:
                return True

    async def _reply(self, handle: str, name: str) -> None:
        crash, others = self.crash[cast(Any, handle)], self.in_flight[handle]
        others.append(name)
        self.beside[name] = 0
        try:
            for _ in range(self.ticks):
                for one in others:
                    self.beside[one] = max(self.beside[one], len(others) - 1)
                if self.poison & set(others) or (handle in self.broken):
                    if not crash.is_set():
                        self.died_with.append(len(others))
                    crash.set()
                await asyncio.sleep(0)
                if crash.is_set():
                    raise RayError("the engine died")
        finally:
            others.remove(name)
            if not others:
                crash.clear()

    async def run(self, count: int) -> list[str]:
        """The inputs that were given up."""
        names = [f"p{index}" for index in range(count)]
        async with asyncio.timeout(20):
            done = await asyncio.gather(*(self.until_done(name) for name in names))
        return [name for name, succeeded in zip(names, done, strict=True) if not succeeded]


@pytest.mark.parametrize("num_members", [1, 2, 5])
@pytest.mark.parametrize("number", [0, 7, 39])
@pytest.mark.parametrize("max_in_flight", [1, 8, 64])
async def test_an_input_that_kills_every_member_is_given_up_and_all_others_succeed(
    monkeypatch: pytest.MonkeyPatch, num_members: int, number: int, max_in_flight: int
) -> None:
    poison = {f"p{number}"}
    pool = Poisoned(num_members, monkeypatch, poison=poison, max_in_flight=max_in_flight)
    assert set(await pool.run(40)) == poison
    failures = sum(name.endswith("failed") for name in pool.log.names)
    halvings = math.ceil(math.log2(min(max_in_flight, 40)))
    assert MAX_ALONE <= failures <= MAX_SHARED + halvings + MAX_ALONE
    assert not any(name.endswith("missing") for name in pool.log.names)
    assert pool.beside[f"p{number}"] == 0, "at the last failure it was alone"
    assert all(member.in_flight == 0 and member.company is None for member in pool.pool._members)


async def test_suspects_are_told_apart_by_halving(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Poisoned(1, monkeypatch, poison={"p39"}, max_in_flight=64)
    await pool.run(40)
    assert pool.died_with[:5] == [40, 40, 20, 10, 5]
    assert pool.died_with[-MAX_ALONE:] == [1] * MAX_ALONE
    assert len(pool.died_with) <= 10


async def test_several_such_inputs_at_once_are_all_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison = {"p3", "p17", "p30"}
    pool = Poisoned(4, monkeypatch, poison=poison, max_in_flight=8)
    assert set(await pool.run(64)) == poison


async def test_a_suspect_is_tried_on_members_that_it_has_not_failed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Poisoned(5, monkeypatch, poison={"p0"}, max_in_flight=1)
    assert await pool.run(1) == ["p0"]
    failed = [name for name in pool.log.names if name.endswith("failed")]
    assert len(set(failed)) == MAX_ALONE


async def test_equal_inputs_that_kill_take_no_more_members_along_than_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first failures come at once, one a member. Then they run one by one."""
    pool = Poisoned(3, monkeypatch, poison={"p0"}, max_in_flight=8)
    async with asyncio.timeout(20):
        done = await asyncio.gather(*(pool.until_done("p0") for _ in range(6)))
    assert not any(done)
    assert sum(name.endswith("failed") for name in pool.log.names) <= 3 + MAX_ALONE


async def test_members_that_die_of_everything_end_the_run_and_no_input_is_blamed_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Poisoned(1, monkeypatch, poison=set(), max_in_flight=8)
    pool.broken.add("generator 0")
    with pytest.raises(ClusterError, match=r"generator 0 failed 3 times in a row"):
        await pool.run(4)


async def test_a_broken_member_gets_no_input_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Poisoned(3, monkeypatch, poison=set(), max_in_flight=4)
    pool.broken.add("generator 1")
    assert await pool.run(60) == []


async def test_a_cancelled_suspect_leaves_no_member_reserved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Poisoned(1, monkeypatch, poison=set(), max_in_flight=2)
    pool.ticks = 100
    for _ in range(MAX_SHARED):
        pool.pool._suspects.failed("generator 0", ["suspect", "another"])
    beside = asyncio.create_task(pool.until_done("p0"))
    await asyncio.sleep(0)
    suspect = asyncio.create_task(pool.until_done("suspect"))
    await settle()
    later = asyncio.create_task(pool.until_done("p1"))
    await settle()
    assert pool.in_flight["generator 0"] == ["p0"], "it is reserved"
    suspect.cancel()
    await settle()
    assert pool.in_flight["generator 0"] == ["p0", "p1"]
    assert await asyncio.wait_for(beside, 5)
    assert await asyncio.wait_for(later, 5)
