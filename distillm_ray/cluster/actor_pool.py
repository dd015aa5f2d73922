"""A pool of actors, and the policy for what fails in them.

A call goes to the member with the fewest calls in flight. What raises, hangs past its limit or dies
is killed; Ray restarts it, on another node if need be, and it comes back with the newest weights.
Ray never retries a call by itself: a retried generation would sample other tokens under the old
metadata. Instead the caller hears `ActorLost` and decides. `MAX_FAILURES` failures of a member
without a success in between end the run, because something is wrong that a restart cannot mend;
so do as many crashes while it starts, and whatever its `start` raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import ray
from ray.exceptions import (
    ActorDiedError,
    RayActorError,
    RayError,
    RayTaskError,
)

from distillm_ray.errors import ClusterError, UserError
from distillm_ray.log.records import EventRecord
from distillm_ray.rollout.loop import ActorLost, Log

MAX_FAILURES = 3
_RESTART_POLL_S = 0.2

Actor: TypeAlias = Any
"""A handle of a Ray actor: the methods that it has are known at run time only."""

Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class Member:
    """One actor of a pool, as the pool sees it."""

    name: str
    handle: Actor
    in_flight: int = 0
    failures: int = 0  # without a success in between
    life: int = 0  # how often it was replaced
    process: str = ""  # the one that was started last
    killed: str = ""  # the one that was killed last, which may still answer for a while
    ready: asyncio.Event = field(default_factory=asyncio.Event)


class ActorPool:
    """Spreads calls over `PooledActor`s with a `start` method; see the module for what fails."""

    def __init__(
        self,
        handles: Sequence[Actor],
        *,
        role: str,
        max_in_flight: int,
        call_timeout_s: float,
        startup_timeout_s: float,
        log: Log,
    ) -> None:
        self._role = role
        self._members = [
            Member(name=f"{role} {index}", handle=handle) for index, handle in enumerate(handles)
        ]
        self._max_in_flight = max_in_flight
        self._call_timeout_s = call_timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._log = log
        self._freed = asyncio.Condition()
        self._recoveries: set[asyncio.Task[None]] = set()
        self._fatal: UserError | None = None

    async def start(self) -> None:
        """Start every member. Raises ClusterError if one cannot start."""
        await asyncio.gather(*(self._start(member) for member in self._members))

    async def call(self, invoke: Callable[[Actor], Awaitable[Result]]) -> Result:
        """Run `invoke` on the least busy member.

        Raises:
            ActorLost: it failed; the member is being replaced.
            ClusterError: it failed too often.
            UserError: the call itself was wrong, whoever answers it.
        """
        member = await self._acquire()
        life = member.life
        try:
            result = await asyncio.wait_for(invoke(member.handle), self._call_timeout_s)
        except (RayError, TimeoutError) as error:
            await self._replace(member, life, error)
            raise ActorLost(f"{member.name}: {one_line(error)}") from error
        finally:
            await self._release(member)
        member.failures = 0
        return result

    async def restart(self) -> None:
        """Replace every member by a new process, as it was at the start."""
        recoveries = list(self._recoveries)
        for recovery in recoveries:
            recovery.cancel()
        await asyncio.gather(*recoveries, return_exceptions=True)
        for member in self._members:
            self._kill(member)
        await self.start()

    async def _start(self, member: Member) -> None:
        """Returns when the member is ready for calls."""
        latest = "its process did not come up; is there room for it in the cluster?"
        crashes = 0
        try:
            async with asyncio.timeout(self._startup_timeout_s):
                while True:
                    up = False
                    try:
                        member.process = await member.handle.process.remote()
                        if member.process == member.killed:
                            await asyncio.sleep(_RESTART_POLL_S)
                            continue
                        up = True
                        latest = "its process is up, but its start has not returned"
                        await member.handle.start.remote()
                        latest = "it has not taken the newest weights"
                        await self._prepare(member)
                        break
                    except RayActorError as error:
                        # While Ray restarts it, every call fails at once.
                        crashes += up or isinstance(error, ActorDiedError)
                        latest = one_line(error)
                        if crashes == MAX_FAILURES:
                            raise
                        await asyncio.sleep(_RESTART_POLL_S)
        except RayError as error:
            cause = cause_of(error)
            if isinstance(cause, UserError):
                raise cause from error
            raise ClusterError(f"{member.name} did not start: {one_line(error)}") from error
        except TimeoutError as error:
            raise ClusterError(
                f"{member.name} was not ready after run.startup_timeout_s ="
                f" {self._startup_timeout_s:g} s: {latest}"
            ) from error
        member.ready.set()
        async with self._freed:
            self._freed.notify_all()

    async def _prepare(self, member: Member) -> None:
        """What a started member needs besides before it may answer."""

    async def _acquire(self) -> Member:
        async with self._freed:
            while True:
                if self._fatal is not None:
                    raise self._fatal
                able = [
                    member
                    for member in self._members
                    if member.ready.is_set() and member.in_flight < self._max_in_flight
                ]
                if able:
                    member = min(able, key=lambda item: item.in_flight)
                    member.in_flight += 1
                    return member
                await self._freed.wait()

    async def _release(self, member: Member) -> None:
        async with self._freed:
            member.in_flight -= 1
            self._freed.notify_all()

    async def _replace(self, member: Member, life: int, error: BaseException) -> None:
        """Kill a member that failed in this life, and bring it back in the background."""
        cause = cause_of(error)
        if isinstance(cause, UserError):
            raise cause from error
        if member.life != life:
            return  # another of its calls has seen to it
        member.failures += 1
        self._kill(member)
        await self._log.add(EventRecord(name=f"{member.name} failed", detail=one_line(error)))
        if member.failures >= MAX_FAILURES:
            fatal = ClusterError(
                f"{member.name} failed {member.failures} times in a row, the last time with:"
                f" {one_line(error)}; see the log of its node for the whole story"
            )
            await self._give_up(fatal)
            raise fatal from error
        task = asyncio.create_task(self._recover(member))
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    def _kill(self, member: Member) -> None:
        member.ready.clear()
        member.life += 1
        member.killed = member.process
        ray.kill(member.handle, no_restart=False)

    async def _recover(self, member: Member) -> None:
        try:
            await self._start(member)
        except UserError as error:
            await self._give_up(error)
            return
        await self._log.add(EventRecord(name=f"{member.name} is back"))

    async def _give_up(self, fatal: UserError) -> None:
        """From here on every call raises this, those that wait for a member included."""
        self._fatal = fatal
        async with self._freed:
            self._freed.notify_all()


def cause_of(error: BaseException) -> BaseException:
    """What went wrong in the actor, where Ray hands on what was raised there."""
    return error.cause if isinstance(error, RayTaskError) else error


def one_line(error: BaseException, limit: int = 300) -> str:
    cause = cause_of(error)
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
