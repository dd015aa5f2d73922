"""A pool of actors, and what happens when one of them fails.

A call goes to the member with the fewest calls in flight. Where all are full, calls wait in the
order of their arrival, and each call that ends hands its place to the first of them: one wake-up,
however many wait.

A member whose call raises, hangs past its limit or dies is killed. Ray restarts its process, on
another node if need be, and the pool prepares it again. Ray itself never repeats a call: a repeated
generation would sample other tokens under the old metadata. The caller gets `ActorLost` and
decides.

    wait                        ends when                           limit
    ------------------------    --------------------------------    ---------------------------
    for a free place            a call ends or a member is ready    none: its callers are bounded
    for a call                  the member replies                  `call_timeout_s`
    for a member to start       it is up, started and prepared      `startup_timeout_s`

`MAX_FAILURES` failures of a member without a success in between end the run, because a restart does
not fix their cause. So do as many crashes during its start, and any error that its `start` raises.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

import ray
from ray.actor import ActorProxy
from ray.exceptions import ActorDiedError, RayActorError, RayError

from distillm_ray.cluster.actors import cause_of, kill, one_line
from distillm_ray.cluster.busy_clock import BusyClock
from distillm_ray.cluster.log import AsyncLog
from distillm_ray.cluster.reporter import Reporting
from distillm_ray.errors import ClusterError, UserError
from distillm_ray.log.costs import Role, RoleCost
from distillm_ray.log.records import EventRecord
from distillm_ray.log.timeline import Timeline

MAX_FAILURES = 3
_RESTART_POLL_S = 0.2


class ActorLost(Exception):
    """An actor died or hung during a call; its pool is already replacing it."""


class PooledActor(Reporting):
    """An actor of a pool. Its process may be replaced under the same handle."""

    @ray.method
    async def process(self) -> str:
        """Identifies the process: a restarted actor returns another value."""
        return ray.get_runtime_context().get_worker_id()

    @ray.method
    async def start(self) -> None:
        """Load the model. Called once in each process."""
        raise NotImplementedError

    @ray.method
    async def remark(self) -> str:
        """What a user should know about how the model runs; empty if nothing."""
        return ""


A = TypeVar("A", bound=PooledActor)
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class Member(Generic[A]):
    """One actor of a pool."""

    name: str
    handle: ActorProxy[A]
    in_flight: int = 0
    failures: int = 0  # without a success in between
    life: int = 0  # how often it was replaced
    process: str = ""  # the process that started last
    killed: str = ""  # the process that was killed last, which may still reply for a while
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    busy: BusyClock = field(default_factory=BusyClock)


Place: TypeAlias = tuple[Member[A], int]
"""A member on which a call may run, and the member's life when the call was admitted."""


class ActorPool(Generic[A]):
    """Spreads calls over actors and replaces those that fail."""

    def __init__(
        self,
        handles: Sequence[ActorProxy[A]],
        *,
        role: Role,
        max_in_flight: int,
        call_timeout_s: float,
        startup_timeout_s: float,
        log: AsyncLog,
        timeline: Timeline | None = None,
    ) -> None:
        self._role: Role = role
        self._timeline = timeline or Timeline()
        self._queue = BusyClock()
        self._members = [
            Member(name=f"{role} {index}", handle=handle) for index, handle in enumerate(handles)
        ]
        self._max_in_flight = max_in_flight
        self._call_timeout_s = call_timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._log = log
        self._waiting: deque[asyncio.Future[Place[A]]] = deque()  # calls, the first to come first
        self._recoveries: set[asyncio.Task[None]] = set()
        self._fatal: UserError | None = None

    async def start(self) -> None:
        """Start every member.

        Raises:
            ClusterError: one does not start.
            UserError: what its `start` raised.
        """
        await asyncio.gather(*(self._start(member) for member in self._members))
        remark = ""
        with contextlib.suppress(RayError):  # the next call to the member deals with its failure
            remark = await self._members[0].handle.remark.remote()
        if remark:
            await self._log.add(EventRecord(name=f"{self._role}s", detail=remark))

    async def call(self, invoke: Callable[[ActorProxy[A]], Awaitable[Result]]) -> Result:
        """Run `invoke` on the least busy member.

        Raises:
            ActorLost: the member failed and is being replaced.
            ClusterError: it failed too often.
            UserError: the call itself was wrong, whichever member runs it.
        """
        member, life = await self._acquire()
        try:
            with member.busy.running(), self._timeline.call(self._role, member.name, "busy"):
                result = await asyncio.wait_for(invoke(member.handle), self._call_timeout_s)
        except (RayError, TimeoutError) as error:
            await self._replace(member, life, error)
            raise ActorLost(f"{member.name}: {one_line(error)}") from error
        finally:
            self._release(member)
        member.failures = 0
        return result

    async def call_until_done(self, invoke: Callable[[ActorProxy[A]], Awaitable[Result]]) -> Result:
        """`call`, repeated while members are lost; the pool limits how often one may fail."""
        while True:
            try:
                return await self.call(invoke)
            except ActorLost:
                continue

    def cost(self) -> RoleCost:
        """How long the members were busy, and how long calls waited for one."""
        return RoleCost(
            busy_seconds=sum(member.busy.seconds for member in self._members),
            queue_seconds=self._queue.call_seconds,
        )

    async def restart(self) -> None:
        """Replace every member by a new process, in the state after `start`."""
        recoveries = list(self._recoveries)
        for recovery in recoveries:
            recovery.cancel()
        await asyncio.gather(*recoveries, return_exceptions=True)
        for member in self._members:
            self._kill(member)
        await self.start()

    async def _start(self, member: Member[A]) -> None:
        """Return when the member is ready for calls."""
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
                        if self._log.actor is not None:
                            await member.handle.report_to.remote(self._log.actor, self._role)
                        latest = "its process is up, but its start has not returned"
                        await member.handle.start.remote()
                        latest = "it has not taken the newest weights"
                        await self._prepare(member)
                        break
                    except RayActorError as error:
                        # While Ray restarts the process, every call fails at once.
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
        self._hand_out()

    async def _prepare(self, member: Member[A]) -> None:
        """Bring a started member to the state of the others. Overridden by pools that have one."""

    async def _acquire(self) -> Place[A]:
        """Take a place, or wait in line for one.

        A call that is cancelled when it has just got its place passes it on. If the member was
        killed meanwhile, the call is the first in line again.
        """
        enqueue = self._waiting.append
        while True:
            if self._fatal is not None:
                raise self._fatal
            place = self._take()
            if place is not None:
                return place
            turn: asyncio.Future[Place[A]] = asyncio.get_running_loop().create_future()
            enqueue(turn)
            try:
                with (
                    self._queue.running(),
                    self._timeline.count(self._role, f"{self._role}s, queue"),
                ):
                    member, life = await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled() and turn.exception() is None:
                    self._release(turn.result()[0])
                raise
            if member.life == life:
                return member, life
            member.in_flight -= 1
            enqueue = self._waiting.appendleft

    def _take(self) -> Place[A] | None:
        """A place on the least busy member; None while none is free."""
        able = [
            member
            for member in self._members
            if member.ready.is_set() and member.in_flight < self._max_in_flight
        ]
        if not able:
            return None
        member = min(able, key=lambda item: item.in_flight)
        member.in_flight += 1
        return member, member.life

    def _release(self, member: Member[A]) -> None:
        member.in_flight -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        """Give every free place to the first that waits, so that no call waits beside one."""
        while self._waiting:
            if self._waiting[0].done():  # cancelled
                self._waiting.popleft()
                continue
            place = self._take()
            if place is None:
                return
            self._waiting.popleft().set_result(place)

    async def _replace(self, member: Member[A], life: int, error: BaseException) -> None:
        """Kill a member that failed in this life, and bring it back in the background."""
        cause = cause_of(error)
        if isinstance(cause, UserError):
            raise cause from error
        if member.life != life:
            return  # another of its calls has already replaced it
        member.failures += 1
        self._kill(member)
        await self._log.add(EventRecord(name=f"{member.name} failed", detail=one_line(error)))
        if member.failures >= MAX_FAILURES:
            fatal = ClusterError(
                f"{member.name} failed {member.failures} times in a row, the last time with:"
                f" {one_line(error)}; see the log of its node for the details"
            )
            self._give_up(fatal)
            raise fatal from error
        task = asyncio.create_task(self._recover(member))
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    def _kill(self, member: Member[A]) -> None:
        member.ready.clear()
        member.life += 1
        member.killed = member.process
        kill(member.handle, no_restart=False)

    async def _recover(self, member: Member[A]) -> None:
        try:
            await self._start(member)
        except UserError as error:
            self._give_up(error)
            return
        await self._log.add(EventRecord(name=f"{member.name} is back"))

    def _give_up(self, fatal: UserError) -> None:
        """Make every later call raise `fatal`, and those that wait for a member too."""
        self._fatal = fatal
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(fatal)
