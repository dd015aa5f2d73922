"""A pool that adds members while the learners wait for it, and releases idle ones.

elasticity.py decides, this file carries it out. The members that the pool starts with stay; those
that it has added come and go. None of what follows is held against a member or ends a run.

    wait                        ends when                              limit
    ------------------------    -----------------------------------    ------------------------
    for room in the cluster     the process of an added member is      none: the pool works with
                                up, or nothing needs it any more       what it has
    for an added member         it is started and prepared as a        `startup_timeout_s`, then
                                replacement is                         it is given back
    for a member to drain       its calls have ended                   none: they are bounded

An actor without room is pending in Ray, and that is what Ray's autoscaler adds nodes for. A member
that is being drained gets no calls; it is the first to be used again if the pool grows meanwhile.
An added member that fails and does not come back is given back too: what it leaves undone shows in
the load, and the pool may ask for another one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from ray.actor import ActorProxy
from ray.exceptions import RayError

from distillm_ray.cluster.actors import kill, one_line
from distillm_ray.cluster.busy_clock import BusyClock
from distillm_ray.cluster.elasticity import Elasticity, Look
from distillm_ray.cluster.log import AsyncLog
from distillm_ray.cluster.member import A, Member
from distillm_ray.cluster.pool import ActorPool, Result
from distillm_ray.config import ActorRange
from distillm_ray.errors import UserError
from distillm_ray.log.costs import Role
from distillm_ray.log.records import EventRecord
from distillm_ray.log.timeline import Timeline

_LOOKS = 6  # in the time after which a pool grows, and at least one in _LONGEST_LOOK_S
_LONGEST_LOOK_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth(Generic[A]):
    """How a pool may grow."""

    bounds: ActorRange
    places: int  # calls that one member works on at the same time
    add: Callable[[], ActorProxy[A]]  # starts one more process, which loads nothing yet


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """The members of a pool at one time."""

    ready: int  # those that work, being drained or not
    starting: int  # those that wait for room or load their model


class ElasticPool(ActorPool[A]):
    """An `ActorPool` that may have a `Growth`; without one its size is fixed."""

    def __init__(
        self,
        handles: Sequence[ActorProxy[A]],
        *,
        role: Role,
        max_in_flight: int,
        stall_timeout_s: float,
        startup_timeout_s: float,
        log: AsyncLog,
        min_actors: int = 1,
        timeline: Timeline | None = None,
        growth: Growth[A] | None = None,
    ) -> None:
        super().__init__(
            handles,
            role=role,
            max_in_flight=max_in_flight,
            stall_timeout_s=stall_timeout_s,
            startup_timeout_s=startup_timeout_s,
            log=log,
            min_actors=min_actors,
            timeline=timeline,
        )
        self._growth = growth
        self._load = BusyClock()
        self._calls = 0
        self._peak = 0  # of _calls, since the last look
        self._failed_starts = 0
        self._failed_at = -math.inf

    @property
    def size(self) -> PoolSize:
        """The members that work, and those that start."""
        ready = sum(member.ready.is_set() for member in self._members)
        return PoolSize(ready=ready, starting=len(self._members) - ready - self._num_missing)

    async def call(self, name: str, invoke: Callable[[ActorProxy[A]], Awaitable[Result]]) -> Result:
        """As `ActorPool.call`, and counted as load."""
        self._calls += 1
        self._peak = max(self._peak, self._calls)
        try:
            with self._load.running():
                return await super().call(name, invoke)
        finally:
            self._calls -= 1

    async def follow(self, waited: Callable[[], Awaitable[float]]) -> None:
        """Keep the pool at the size that its load asks for, until cancelled.

        Members that are not ready by then are given back: nobody may be left to prepare them.

        Args:
            waited: returns for how many seconds the pool was waited for, so far.
        """
        growth = self._growth
        if growth is None:
            return
        bounds = growth.bounds
        elasticity = Elasticity(
            fewest=bounds.min,
            most=bounds.max,
            places=growth.places,
            grow_after_s=bounds.grow_after_s,
            shrink_after_s=bounds.shrink_after_s,
        )
        try:
            while True:
                await self._release_drained()
                elasticity, change = elasticity.after(self._look(await waited()))
                if change > 0:
                    await self._add(growth, change)
                elif change < 0:
                    await self._drain(-change)
                await asyncio.sleep(min(bounds.grow_after_s / _LOOKS, _LONGEST_LOOK_S))
        finally:
            for member in self._joining:
                self._dismiss(member)

    async def restart(self) -> None:
        """As `ActorPool.restart`. Added members that do not work are given back, not waited for."""
        for member in [one for one in self._members if one.added and not one.takes_calls]:
            self._dismiss(member)
        await super().restart()

    def release_added(self) -> None:
        """The pool has done its work: end the members that it has added.

        No call may be in flight. Whoever started the others ends them.
        """
        for member in list(self._members):
            if member.added:
                self._dismiss(member)
            else:
                member.ready.clear()

    # ---- inside ----------------------------------------------------------------------------------

    @property
    def _joining(self) -> list[Member[A]]:
        return [member for member in self._members if member.joining is not None]

    @property
    def _draining(self) -> list[Member[A]]:
        return [member for member in self._members if member.draining]

    @property
    def _num_missing(self) -> int:
        return sum(
            member.missing and member.joining is None and not member.ready.is_set()
            for member in self._members
        )

    def _look(self, waited_s: float) -> Look:
        peak, self._peak = self._peak, self._calls
        size = self.size
        return Look(
            time=time.monotonic(),
            waited_s=waited_s,
            call_seconds=self._load.call_seconds,
            peak=peak,
            ready=size.ready - len(self._draining),
            starting=size.starting,
            missing=self._num_missing,
            failed_starts=self._failed_starts,
            failed_at=self._failed_at,
        )

    async def _add(self, growth: Growth[A], count: int) -> None:
        """Have so many more members: first those that are being drained, then new ones."""
        kept = self._draining[:count]
        for member in kept:
            member.draining = False
            await self._note(f"{member.name} stays", "the learners wait again")
        self._places.hand_out()
        for _ in range(count - len(kept)):
            member = self._enlist(growth.add())
            member.added = member.absent = True  # not counted on before it is ready
            member.joining = asyncio.create_task(self._join(member))
            await self._note(
                f"{member.name} is asked for",
                f"the learners wait, and {self._calls} calls are more than"
                f" {self.size.ready} {self._role}s work on at once",
            )

    async def _join(self, member: Member[A]) -> None:
        """Make a new member ready, as soon as there is room for it."""
        try:
            await member.handle.process.remote()
            await self._start(member)
        except (UserError, RayError) as error:
            self._count_failed_start()
            member.joining = None
            self._dismiss(member)
            await self._note(f"{member.name} did not join", one_line(error))
            return
        member.joining, member.absent = None, False
        self._failed_starts = 0
        await self._note(f"{member.name} joined", f"{self.size.ready} {self._role}s work")

    async def _drain(self, count: int) -> None:
        """Release so many added members: those that are not ready at once, the others when idle."""
        added = [one for one in self._members if one.added and not one.draining]
        order = sorted(added, key=lambda one: (one.ready.is_set(), one.in_flight))
        for member in order[:count]:
            if member.ready.is_set():
                member.draining = True
                await self._note(f"{member.name} drains", f"{member.in_flight} calls in flight")
            else:
                self._dismiss(member)
                await self._note(f"{member.name} is no longer asked for", "the load fell")
        await self._release_drained()

    async def _release_drained(self) -> None:
        for member in self._draining:
            if member.in_flight == 0:
                self._dismiss(member)
                await self._note(f"{member.name} is released", f"{self.size.ready} are left")

    async def _dismissed(self, member: Member[A], why: str) -> bool:
        if member not in self._members:
            return True
        if not member.added or not (member.draining or member.missing):
            return False
        if not member.draining:
            self._count_failed_start()
        self._dismiss(member)
        await self._note(f"{member.name} is given back", why)
        return True

    def _count_failed_start(self) -> None:
        self._failed_starts += 1
        self._failed_at = time.monotonic()

    def _dismiss(self, member: Member[A]) -> None:
        """Remove a member, and end its process or its request for room."""
        if member not in self._members:
            return  # it failed and has left while this was being decided
        self._members.remove(member)
        member.ready.clear()
        member.life += 1  # what is still in flight finds that it was replaced
        if member.joining is not None:
            member.joining.cancel()
        kill(member.handle, no_restart=True)
        self._places.hand_out()  # it may have been reserved for a call that now needs another one

    async def _note(self, name: str, detail: str) -> None:
        await self._log.add(EventRecord(name=name, detail=detail))
