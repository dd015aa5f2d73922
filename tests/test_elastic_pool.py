"""A pool that grows and shrinks, over handles that are plain objects: no Ray and no clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayError

from distillm_ray.cluster import elastic_pool, pool
from distillm_ray.cluster.elastic_pool import ElasticPool, Growth, PoolSize
from distillm_ray.cluster.elasticity import Look
from distillm_ray.cluster.member import MAX_FAILURES, Member
from distillm_ray.cluster.pool import ActorLost
from distillm_ray.config import ActorRange
from distillm_ray.errors import ClusterError
from tests.integration.actors import Events

PLACES = 2


@dataclass(eq=False)
class Handle:
    """An actor that replies at once, as soon as the cluster has room for it."""

    room: asyncio.Event = field(default_factory=asyncio.Event)
    starts: int = 0
    broken: str = ""  # what its start raises
    killed: bool = False  # for good
    life: int = 0

    def __getattr__(self, name: str) -> Any:
        if name not in ("process", "start", "remark", "silent_s"):
            raise AttributeError(name)
        return SimpleNamespace(remote=getattr(self, f"_{name}"))

    async def _process(self) -> str:
        await self.room.wait()
        return f"process {self.life}"

    async def _start(self) -> None:
        self.starts += 1
        await asyncio.sleep(0)
        if self.broken:
            raise RayError(self.broken)

    async def _remark(self) -> str:
        return ""


class Fakes:
    """A pool of 1 to 4 members with two places each, whose size a test decides.

    The pure function that decides otherwise has tests of its own.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(elastic_pool, "kill", self._kill)
        monkeypatch.setattr(pool, "kill", self._kill)
        monkeypatch.setattr(pool, "_RESTART_POLL_S", 0.0)
        monkeypatch.setattr(elastic_pool, "_LONGEST_LOOK_S", 0.0)
        monkeypatch.setattr(elastic_pool.Elasticity, "after", self._after)
        self.handles: list[Handle] = []
        self.log = Events()
        self.looks: list[Look] = []
        self.change = 0  # what the next look decides
        self.breaks: str = ""  # what the start of the next added member raises
        self.has_room = True
        self.running: dict[int, tuple[Any, asyncio.Future[None]]] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.prepared: list[Any] = []

        monkeypatch.setattr(ElasticPool, "_prepare", self._prepare)
        self.pool: ElasticPool[Any] = ElasticPool(
            cast(Any, [self._add()]),
            role="generator",
            max_in_flight=PLACES,
            stall_timeout_s=60.0,
            startup_timeout_s=60.0,
            log=cast(Any, self.log),
            growth=Growth(bounds=ActorRange(min=1, max=4), places=PLACES, add=cast(Any, self._add)),
        )

    async def _prepare(self, member: Member[Any]) -> None:
        self.prepared.append(member.handle)

    def _add(self) -> Handle:
        self.handles.append(Handle(broken=self.breaks))
        if self.has_room:
            self.handles[-1].room.set()
        return self.handles[-1]

    def _kill(self, handle: Handle, *, no_restart: bool) -> None:
        handle.killed = no_restart
        handle.life += 1

    def _after(self, look: Look) -> tuple[Any, int]:
        change, self.change = self.change, 0
        self.looks.append(look)
        return SimpleNamespace(after=self._after), change

    async def decide(self, change: int) -> None:
        """Have the next look change the size, and the pool carry it out."""
        self.change = change
        seen = len(self.looks)
        await until(lambda: len(self.looks) >= seen + 3)
        await settle()

    async def call(self, number: int) -> None:
        """Begin a call that ends when the test ends it."""

        async def invoke(handle: Any) -> None:
            end = asyncio.get_running_loop().create_future()
            self.running[number] = handle, end
            await end

        self.tasks[number] = asyncio.create_task(
            self.pool.call(f"input {number}", cast(Callable[[Any], Awaitable[None]], invoke))
        )
        await settle()

    async def end(self, *numbers: int) -> None:
        for number in numbers:
            self.running.pop(number)[1].set_result(None)
        await settle()

    def of(self, handle: Handle) -> list[int]:
        """The calls that run on a member."""
        return [number for number, (one, _) in self.running.items() if one is handle]

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.pool._members]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


@pytest.fixture
async def fakes(monkeypatch: pytest.MonkeyPatch) -> Any:
    async def waited() -> float:
        return 7.0

    fakes = Fakes(monkeypatch)
    await fakes.pool.start()
    following = asyncio.create_task(fakes.pool.follow(waited))
    yield fakes
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    for task in fakes.tasks.values():
        task.cancel()


# ---- growth --------------------------------------------------------------------------------------


async def test_a_pool_grows_and_calls_that_wait_go_to_the_new_member(fakes: Fakes) -> None:
    for number in range(4):
        await fakes.call(number)
    assert sorted(fakes.running) == [0, 1]
    await fakes.decide(1)
    first, second = fakes.handles
    assert (fakes.of(first), fakes.of(second)) == ([0, 1], [2, 3])
    assert fakes.prepared == [first, second], "prepared before its first call"
    assert fakes.log.names == ["generator 1 is asked for", "generator 1 joined"]
    assert fakes.pool.size == PoolSize(ready=2, starting=0)


async def test_a_look_has_the_peak_since_the_last_one_and_what_the_learners_waited(
    fakes: Fakes,
) -> None:
    for number in range(5):
        await fakes.call(number)
    await fakes.decide(0)
    assert fakes.looks[-1].peak == 5, "three of them wait for a place"
    await fakes.end(0, 1)
    await fakes.end(2, 3)
    await fakes.decide(0)
    look = fakes.looks[-1]
    assert (look.peak, look.ready, look.starting, look.waited_s) == (1, 1, 0, 7.0)


async def test_a_member_that_never_gets_room_blocks_nothing_and_is_no_failure(
    fakes: Fakes,
) -> None:
    fakes.has_room = False
    await fakes.decide(2)
    for number in range(3):
        await fakes.call(number)
    await fakes.end(0, 1)
    await fakes.end(2)
    assert all(task.done() for task in fakes.tasks.values())
    assert fakes.pool.size == PoolSize(ready=1, starting=2)
    look = fakes.looks[-1]
    assert (look.ready, look.starting, look.missing, look.failed_starts) == (1, 2, 0, 0)
    await fakes.decide(-2)
    assert [handle.killed for handle in fakes.handles] == [False, True, True]
    assert (fakes.names, fakes.pool.size.starting) == (["generator 0"], 0)
    assert fakes.log.names[2:] == [
        "generator 1 is no longer asked for",
        "generator 2 is no longer asked for",
    ]


async def test_a_pending_member_does_not_count_where_too_few_are_left(fakes: Fakes) -> None:
    fakes.has_room = False
    await fakes.decide(1)
    fakes.handles[0].broken = "its disk is gone"
    await fakes.call(0)
    fakes.running.pop(0)[1].set_exception(RayError("died"))
    with pytest.raises(ActorLost):
        await fakes.tasks[0]
    await fakes.call(1)
    with pytest.raises(
        ClusterError, match=r"^generator 0 did not start: RayError: its disk is gone$"
    ):
        await asyncio.wait_for(fakes.tasks[1], 30)


async def test_an_added_member_that_cannot_start_is_given_back_and_counted(fakes: Fakes) -> None:
    fakes.breaks = "no GPU after all"
    await fakes.decide(1)
    assert fakes.handles[1].killed and fakes.names == ["generator 0"]
    assert fakes.log.names[-1] == "generator 1 did not join"
    assert "no GPU after all" in fakes.log.details[-1]
    assert fakes.looks[-1].failed_starts == 1
    fakes.breaks = ""
    await fakes.decide(1)
    assert fakes.names == ["generator 0", "generator 1"], "the name is free again"
    assert fakes.looks[-1].failed_starts == 0


async def test_a_pool_grows_while_one_of_its_members_dies(fakes: Fakes) -> None:
    fakes.has_room = False
    await fakes.decide(1)
    first, second = fakes.handles
    await fakes.call(0)
    fakes.running.pop(0)[1].set_exception(RayError("died"))
    with pytest.raises(ActorLost):
        await fakes.tasks[0]
    second.room.set()
    await until(lambda: fakes.pool.size == PoolSize(ready=2, starting=0))
    assert (first.starts, second.starts) == (2, 1)
    for number in (1, 2):
        await fakes.call(number)
    assert (len(fakes.of(first)), len(fakes.of(second))) == (1, 1)


# ---- shrinkage -----------------------------------------------------------------------------------


async def test_a_member_is_drained_before_it_is_released_and_no_call_is_lost(
    fakes: Fakes,
) -> None:
    await fakes.decide(1)
    first, second = fakes.handles
    for number in range(4):
        await fakes.call(number)
    on_second = fakes.of(second)
    assert len(on_second) == 2
    await fakes.decide(-1)
    assert not second.killed and fakes.pool.size.ready == 2
    assert fakes.looks[-1].ready == 1
    await fakes.call(4)
    await fakes.end(on_second[0])
    assert 4 not in fakes.running, "it gets no more calls"
    await fakes.end(on_second[1])
    await fakes.decide(0)
    assert second.killed and not first.killed and fakes.names == ["generator 0"]
    await fakes.end(*fakes.of(first))
    await fakes.end(4)
    assert [task.exception() for task in fakes.tasks.values()] == [None] * 5
    assert fakes.log.names[-2:] == ["generator 1 drains", "generator 1 is released"]


async def test_the_least_busy_added_members_go_first_and_those_of_the_start_stay(
    fakes: Fakes,
) -> None:
    await fakes.decide(2)
    first, second, third = fakes.handles
    for number in range(5):
        await fakes.call(number)
    await fakes.end(*fakes.of(first))
    busier, idler = sorted((second, third), key=lambda one: len(fakes.of(one)), reverse=True)
    assert (len(fakes.of(busier)), len(fakes.of(idler))) == (2, 1)
    await fakes.decide(-1)
    await fakes.end(*fakes.of(idler))
    await fakes.decide(0)
    assert [handle for handle in fakes.handles if handle.killed] == [idler]


async def test_a_member_that_drains_is_the_first_to_be_used_again(fakes: Fakes) -> None:
    await fakes.decide(1)
    for number in range(4):
        await fakes.call(number)
    await fakes.decide(-1)
    await fakes.call(4)
    await fakes.decide(1)
    assert len(fakes.handles) == 2, "no new process"
    assert fakes.log.names[-1] == "generator 1 stays"
    await fakes.end(fakes.of(fakes.handles[1])[0])
    assert 4 in fakes.of(fakes.handles[1])


async def test_a_member_that_dies_while_it_drains_leaves_the_pool(fakes: Fakes) -> None:
    await fakes.decide(1)
    for number in range(2):
        await fakes.call(number)
    (number,) = fakes.of(fakes.handles[1])
    await fakes.decide(-1)
    fakes.running.pop(number)[1].set_exception(RayError("died"))
    with pytest.raises(ActorLost):
        await fakes.tasks[number]
    assert fakes.names == ["generator 0"] and fakes.handles[1].killed
    assert fakes.handles[1].starts == 1


async def test_busy_seconds_of_released_members_stay_in_the_cost(fakes: Fakes) -> None:
    await fakes.decide(1)
    for number in range(2):
        await fakes.call(number)
    await asyncio.sleep(0.02)
    await fakes.end(0, 1)
    before = fakes.pool.cost().busy_seconds
    assert before >= 0.04
    await fakes.decide(-1)
    assert len(fakes.names) == 1 and fakes.pool.cost().busy_seconds == before


# ---- restart and end -----------------------------------------------------------------------------


async def test_a_rewind_gives_back_those_that_come_or_go_and_restarts_the_others(
    fakes: Fakes,
) -> None:
    await fakes.decide(2)
    await fakes.call(0)
    await fakes.call(1)
    await fakes.call(2)
    await fakes.decide(-1)
    (drains,) = [member for member in fakes.pool._members if member.draining]
    await fakes.pool.restart()
    assert fakes.pool.size == PoolSize(ready=2, starting=0)
    assert [handle for handle in fakes.handles if handle.killed] == [drains.handle]
    assert [handle.starts for handle in fakes.handles if not handle.killed] == [2, 2]


async def test_the_end_gives_back_what_is_not_ready_and_keeps_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def waited() -> float:
        return 0.0

    fakes = Fakes(monkeypatch)
    await fakes.pool.start()
    following = asyncio.create_task(fakes.pool.follow(waited))
    await fakes.decide(1)
    fakes.has_room = False
    await fakes.decide(1)
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    assert [handle.killed for handle in fakes.handles] == [False, False, True]
    fakes.pool.release_added()
    assert [handle.killed for handle in fakes.handles] == [False, True, True]


async def test_a_rewind_does_not_wait_for_an_added_member_without_room(fakes: Fakes) -> None:
    await fakes.decide(1)
    added = fakes.handles[1]
    added.room.clear()  # its node is gone, and no other has room
    member = fakes.pool._members[1]
    member.ready.clear()
    async with asyncio.timeout(5):
        await fakes.pool.restart()
    assert fakes.names == ["generator 0"]
    assert added.killed


async def test_a_member_that_is_back_is_ready_and_not_missing_too(fakes: Fakes) -> None:
    fakes.pool._members[0].failures = MAX_FAILURES
    assert fakes.pool.size == PoolSize(ready=1, starting=0)


async def test_a_pool_that_is_done_has_no_member_that_is_ready(fakes: Fakes) -> None:
    fakes.pool.release_added()
    assert fakes.pool.state().ready == 0
