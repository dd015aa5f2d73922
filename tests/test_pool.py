"""The pool's line of waiting calls, over handles that are plain objects: what each release wakes.

What happens when actors die is in tests/integration/test_generator_pool.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from distillm_ray.cluster.pool import ActorPool
from distillm_ray.errors import ClusterError


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
        self.tasks += [asyncio.create_task(self.pool.call(self._run(index))) for index in numbers]
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
    calls.pool._release(calls.members[0])  # hands the place of call 0 to call 1
    calls.tasks[1].cancel()  # before it could run
    await settle()
    assert calls.order == [0, 2]
    assert calls.members[0].in_flight == 1


async def test_a_call_whose_member_was_killed_meanwhile_stays_the_first_in_line() -> None:
    calls = Calls()
    [member] = calls.members
    await calls.make(3)
    calls.pool._release(member)
    member.ready.clear()  # killed before call 1 could run
    member.life += 1
    await settle()
    assert (calls.order, member.in_flight) == ([0], 0)
    member.ready.set()
    calls.pool._hand_out()
    await settle()
    assert calls.order == [0, 1]


async def test_a_member_that_gets_ready_takes_as_many_calls_as_it_has_places() -> None:
    calls = Calls(max_in_flight=3)
    [member] = calls.members
    member.ready.clear()
    await calls.make(10)
    member.ready.set()
    calls.pool._hand_out()
    await settle()
    assert (calls.order, member.in_flight) == ([0, 1, 2], 3)


async def test_giving_up_ends_all_calls_that_wait_and_those_that_come_later() -> None:
    calls = Calls()
    await calls.make(3)
    calls.tasks[1].cancel()
    calls.pool._give_up(ClusterError("it failed too often"))
    await calls.make(1)
    for task in (calls.tasks[2], calls.tasks[3]):
        with pytest.raises(ClusterError, match="it failed too often"):
            await task
    await calls.end(0)
    assert await calls.tasks[0] == 0
