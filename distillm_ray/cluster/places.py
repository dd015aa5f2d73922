"""The places of a pool: which call runs on which member, and in which order calls wait for one.

A call goes to the member with the fewest calls in flight. Where all are full, calls wait in the
order of their arrival, and each call that ends hands its place to the first of them: one wake-up,
however many wait. Calls with a suspect wait in a line of their own, and one member gets no more
calls until it is free for as many of them as may run together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias

from distillm_ray.cluster.busy_clock import BusyClock
from distillm_ray.cluster.member import A, Member
from distillm_ray.cluster.suspects import Suspects
from distillm_ray.errors import UserError
from distillm_ray.log.costs import Role
from distillm_ray.log.timeline import Timeline


@dataclass(frozen=True, slots=True, eq=False)
class _Turn(Generic[A]):
    """A call that waits for its place."""

    place: asyncio.Future[Place[A]]
    name: str  # of its input


Place: TypeAlias = tuple[Member[A], int]
"""A member on which a call may run, and the member's life when the call was admitted."""


class Places(Generic[A]):
    """Hands out the places of `members`, which the pool may change.

    Args:
        max_in_flight: places of each member.
        suspects: says how many of them may run together, and where one has failed alone.
    """

    def __init__(
        self,
        members: Sequence[Member[A]],
        *,
        max_in_flight: int,
        suspects: Suspects,
        role: Role,
        timeline: Timeline,
    ) -> None:
        self._members = members
        self.max_in_flight = max_in_flight
        self._suspects = suspects
        self._role: Role = role
        self._timeline = timeline
        self._waiting: deque[_Turn[A]] = deque()  # calls, the first to come first
        self._waiting_suspects: deque[_Turn[A]] = deque()  # those with a suspect
        self._reserved: Member[A] | None = None  # takes no call until it is free for one of these
        self.queue = BusyClock()  # calls that wait
        self.fatal: UserError | None = None  # what every call gets instead of a place

    async def acquire(self, name: str, *, suspect: bool) -> Place[A]:
        """Take a place, or wait in line for one.

        A call that is cancelled when it has just got its place passes it on. If the member was
        killed meanwhile, the call is the first in line again.

        Args:
            suspect: the input is one, and runs with others of its kind at most.
        """
        line = self._waiting_suspects if suspect else self._waiting
        enqueue = line.append
        while True:
            if self.fatal is not None:
                raise self.fatal
            if not suspect and (place := self._take()) is not None:
                return place
            turn: _Turn[A] = _Turn(asyncio.get_running_loop().create_future(), name)
            enqueue(turn)
            if suspect:
                self.hand_out()
            try:
                with (
                    self.queue.running(),
                    self._timeline.count(self._role, f"{self._role}s, queue"),
                ):
                    member, life = await turn.place
            except asyncio.CancelledError:
                got = turn.place
                if got.done() and not got.cancelled() and got.exception() is None:
                    self.release(got.result()[0])
                elif suspect:
                    self.hand_out()  # a member may be reserved for it
                raise
            if member.life == life:
                return member, life
            self._leave(member)
            enqueue = line.appendleft

    def release(self, member: Member[A]) -> None:
        """Free a place."""
        self._leave(member)
        self.hand_out()

    def hand_out(self) -> None:
        """Give every free place to the first that waits, so that no call waits beside one."""
        self._serve(self._waiting_suspects, lambda turn: self._take_for_suspect(turn.name))
        if not self._waiting_suspects:
            self._reserved = None
        self._serve(self._waiting, lambda _: self._take())

    @property
    def num_waiting(self) -> int:
        """Calls without a place, those that were cancelled included until their turn comes."""
        return len(self._waiting_suspects) + len(self._waiting)

    def give_up(self, fatal: UserError) -> None:
        """Make every later call raise `fatal`, and those that wait for a member too."""
        self.fatal = fatal
        for line in (self._waiting_suspects, self._waiting):
            while line:
                turn = line.popleft().place
                if not turn.done():
                    turn.set_exception(fatal)

    def _take(self) -> Place[A] | None:
        """A place on the least busy member; None while none is free."""
        able = [
            member
            for member in self._members
            if member.takes_calls
            and member.company is None
            and member.in_flight < self.max_in_flight
            and member is not self._reserved
        ]
        if not able:
            return None
        member = min(able, key=lambda item: item.in_flight)
        member.in_flight += 1
        return member, member.life

    def _take_for_suspect(self, name: str) -> Place[A] | None:
        """A place beside other suspects, or on a free member; one gets no more calls meanwhile."""
        company = min(self._suspects.company(name) or 1, self.max_in_flight)
        able = [member for member in self._members if member.takes_calls]
        for member in able:
            if member.company is not None and member.in_flight < min(member.company, company):
                member.company = min(member.company, company)
                member.in_flight += 1
                return member, member.life
        able = [member for member in able if member.company is None]
        if self._reserved not in able:
            failed = self._suspects.failed_alone_on(name)
            self._reserved = min(
                able, key=lambda item: (item.name in failed, item.in_flight), default=None
            )
        member = self._reserved
        if member is None or member.in_flight > 0:
            return None
        self._reserved = None
        member.company = company
        member.in_flight = 1
        return member, member.life

    def _leave(self, member: Member[A]) -> None:
        member.in_flight -= 1
        if member.in_flight == 0:
            member.company = None

    def _serve(self, line: deque[_Turn[A]], take: Callable[[_Turn[A]], Place[A] | None]) -> None:
        while line:
            if line[0].place.done():  # cancelled
                line.popleft()
                continue
            place = take(line[0])
            if place is None:
                return
            line.popleft().place.set_result(place)
