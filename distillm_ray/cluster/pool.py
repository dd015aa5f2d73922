"""A pool of actors, and what happens when one of them fails.

Which call runs on which member is decided in places.py.

A member whose call raises, that makes no progress with its calls, or that dies is killed. Ray
restarts its process, on another node if need be, and the pool prepares it again. Ray itself never
repeats a call: a repeated generation would sample other tokens under the old metadata. The caller
gets `ActorLost` and decides. A call that the member itself gives up (`aborted`) costs nothing else.
An input at which member after member fails is given up, by the rules of suspects.py: calls with a
suspect wait in a line of their own for a member without other calls.

    wait                        ends when                           limit
    ------------------------    --------------------------------    ---------------------------
    for a free place            a call ends or a member is ready    none: its callers are bounded
    for a member for suspects   all of its calls have ended         none: they are bounded
    for a call                  the member replies                  `stall_timeout_s` without any
                                                                    progress of the member
    for a member to start       it is up, started and prepared      `startup_timeout_s`

A member is *missing* after `MAX_FAILURES` failures without a success in between, because a restart
does not fix their cause, and after a start that failed: no room in the cluster, a crash, an error.
The others work on, and it is tried again after pauses that double. The run ends where fewer than
`min_actors` members are left. When the job starts, every member has to.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from ray.actor import ActorProxy
from ray.exceptions import ActorDiedError, RayActorError, RayError

from distillm_ray.cluster.actors import cause_of, kill, one_line
from distillm_ray.cluster.busy_clock import BusyClock
from distillm_ray.cluster.log import AsyncLog
from distillm_ray.cluster.member import MAX_FAILURES, A, Member
from distillm_ray.cluster.places import Place, Places
from distillm_ray.cluster.suspects import MAX_ALONE, Suspects
from distillm_ray.errors import ClusterError, UserError
from distillm_ray.log.costs import Role, RoleCost
from distillm_ray.log.prometheus import PoolState
from distillm_ray.log.records import EventRecord
from distillm_ray.log.timeline import Timeline

_RESTART_POLL_S = 0.2
_FIRST_PAUSE_S = 10.0  # before a missing member is tried again
_LONGEST_PAUSE_S = 300.0
_PROGRESS_POLL_S = 15.0  # how often a member is asked whether it gets on
_FROZEN_S = 60.0  # a member that does not even answer that hangs with all of its process


class ActorLost(Exception):
    """An actor died or hung during a call; its pool is already replacing it."""


class InputGivenUp(ClusterError):
    """Members failed at an input, again and again, while they had no other."""


Result = TypeVar("Result")


class ActorPool(Generic[A]):
    """Spreads calls over actors and replaces those that fail."""

    aborted: tuple[type[Exception], ...] = ()
    """What a member raises for a call that it gave up; it works on, and the caller decides."""

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
    ) -> None:
        self._min_actors = min_actors
        self._role: Role = role
        self._timeline = timeline or Timeline()
        self._clocks: dict[str, BusyClock] = {}  # by name of a member, also of those released
        self._members: list[Member[A]] = []
        self._restarts = 0  # of all members, those that are gone included
        for handle in handles:
            self._enlist(handle)
        self._stall_timeout_s = stall_timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._log = log
        self._suspects = Suspects()
        self._places: Places[A] = Places(
            self._members,
            max_in_flight=max_in_flight,
            suspects=self._suspects,
            role=role,
            timeline=self._timeline,
        )
        self._one_by_one: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by suspect
        self._recoveries: set[asyncio.Task[None]] = set()

    def _enlist(self, handle: ActorProxy[A]) -> Member[A]:
        """A new member, under the first name that is free."""
        taken = {member.name for member in self._members}
        names = (f"{self._role} {index}" for index in range(len(taken) + 1))
        name = next(name for name in names if name not in taken)
        busy = self._clocks.setdefault(name, BusyClock())
        member = Member(name=name, handle=handle, busy=busy)
        self._members.append(member)
        return member

    async def start(self) -> None:
        """Start every member.

        Raises:
            ClusterError: one does not start.
            UserError: what its `start` raised.
        """
        await asyncio.gather(*(self._start(member) for member in self._members))
        remark = ""
        # The next call to the member deals with its failure.
        with contextlib.suppress(RayError, TimeoutError):
            call = asyncio.ensure_future(self._members[0].handle.remark.remote())
            remark = await asyncio.wait_for(call, _FROZEN_S)
        if remark:
            await self._log.add(EventRecord(name=f"{self._role}s", detail=remark))

    async def call(self, name: str, invoke: Callable[[ActorProxy[A]], Awaitable[Result]]) -> Result:
        """Run `invoke` on the least busy member.

        Args:
            name: of the input, for a message. Failures at equal names are held against one input.

        Raises:
            ActorLost: the member failed and is being replaced.
            InputGivenUp: members fail at this input.
            ClusterError: too few members are left.
            UserError: the call itself was wrong, whichever member runs it.
            Exception: one of `aborted`.
        """
        self._refuse_if_given_up(name)
        if self._suspects.company(name) is None:
            place = await self._places.acquire(name, suspect=False)
            if self._suspects.company(name) is None:
                return await self._call(name, invoke, place)
            self._places.release(place[0])  # an equal input failed while this one waited
        async with self._one_by_one[name]:
            self._refuse_if_given_up(name)
            suspect = self._suspects.company(name) is not None
            place = await self._places.acquire(name, suspect=suspect)
            return await self._call(name, invoke, place)

    async def _call(
        self,
        name: str,
        invoke: Callable[[ActorProxy[A]], Awaitable[Result]],
        place: Place[A],
    ) -> Result:
        """Run `invoke` on a place, and free it."""
        member, life = place
        inputs = member.inputs
        inputs.append(name)
        try:
            with member.busy.running(), self._timeline.call(self._role, member.name, "busy"):
                result = await self._reply(member, invoke(member.handle))
        except (RayError, TimeoutError) as error:
            if isinstance(cause := cause_of(error), self.aborted):
                raise cause from error
            await self._replace(member, life, error, inputs)
            if self._suspects.is_given_up(name):
                raise InputGivenUp(self._why_given_up(name, one_line(error))) from error
            raise ActorLost(f"{member.name}: {one_line(error)}") from error
        finally:
            inputs.remove(name)
            self._places.release(member)
        member.failures = 0
        self._suspects.succeeded(member.name, name)
        return result

    async def _reply(self, member: Member[A], call: Awaitable[Result]) -> Result:
        """The result of a call, awaited as long as the member gets on with its calls.

        Raises:
            TimeoutError: it does not.
        """
        task = asyncio.ensure_future(call)
        try:
            poll_s = min(_PROGRESS_POLL_S, self._stall_timeout_s)
            while not (await asyncio.wait((task,), timeout=poll_s))[0]:
                if time.monotonic() - member.looked < poll_s:
                    continue  # another of its calls has asked
                member.looked = time.monotonic()
                silent = asyncio.ensure_future(member.handle.silent_s.remote())
                silent_s = await asyncio.wait_for(silent, _FROZEN_S)
                if silent_s > self._stall_timeout_s:
                    raise TimeoutError(f"no progress for {silent_s:.0f} s")
            return task.result()
        finally:
            task.cancel()

    async def call_until_done(
        self, name: str, invoke: Callable[[ActorProxy[A]], Awaitable[Result]]
    ) -> Result:
        """`call`, repeated while members are lost; the pool limits how often one may fail."""
        while True:
            try:
                return await self.call(name, invoke)
            except ActorLost:
                continue

    def cost(self) -> RoleCost:
        """How long the members were busy, and how long calls waited for one."""
        return RoleCost(
            busy_seconds=sum(clock.seconds for clock in list(self._clocks.values())),
            queue_seconds=self._places.queue.call_seconds,
        )

    def state(self) -> PoolState:
        """How many members there are and work, and how many calls wait. May be called in another
        thread.
        """
        return PoolState(
            role=self._role,
            size=len(self._members),
            ready=sum(member.ready.is_set() for member in self._members),
            busy=sum(member.in_flight > 0 for member in self._members),
            queue=self._places.num_waiting,
            restarts=self._restarts,
        )

    async def restart(self) -> None:
        """Replace every member by a new process, in the state after `start`.

        Raises:
            UserError: too few of them start.
        """
        recoveries = list(self._recoveries)
        for recovery in recoveries:
            recovery.cancel()
        await asyncio.gather(*recoveries, return_exceptions=True)
        members = list(self._members)
        for member in members:
            self._kill(member)
        back = await asyncio.gather(*(self._try_start(member) for member in members))
        if self._places.fatal is not None:
            raise self._places.fatal
        for member, is_back in zip(members, back, strict=True):
            if not is_back and member in self._members:
                self._recover_in_background(member)

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
        self._places.hand_out()

    async def _prepare(self, member: Member[A]) -> None:
        """Bring a started member to the state of the others. Overridden by pools that have one."""

    async def _replace(
        self, member: Member[A], life: int, error: BaseException, inputs: Sequence[str] = ()
    ) -> None:
        """Kill a member that failed in this life, and bring it back in the background.

        Any of `inputs`, those of its calls, may be the reason.
        """
        cause = cause_of(error)
        if isinstance(cause, UserError):
            raise cause from error
        if member.life != life:
            return  # another of its calls has already replaced it
        if not inputs or self._suspects.failed(member.name, inputs):
            member.failures += 1
        self._kill(member)
        await self._log.add(EventRecord(name=f"{member.name} failed", detail=one_line(error)))
        if await self._dismissed(member, one_line(error)):
            return
        if member.missing:
            await self._miss(
                member,
                ClusterError(
                    f"{member.name} failed {member.failures} times in a row, the last time with:"
                    f" {one_line(error)}; see the log of its node for the details{self._blamed()}"
                ),
            )
            if self._places.fatal is not None:
                raise self._places.fatal from error
        self._recover_in_background(member)

    def _recover_in_background(self, member: Member[A]) -> None:
        task = asyncio.create_task(self._recover(member))
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    async def _await_end(self, member: Member[A]) -> None:
        """Return when the process that was killed is gone, or none came up in its place in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._startup_timeout_s):
                while True:
                    with contextlib.suppress(RayActorError):
                        if await member.handle.process.remote() != member.killed:
                            return
                    await asyncio.sleep(_RESTART_POLL_S)

    def _kill(self, member: Member[A]) -> None:
        member.ready.clear()
        member.life += 1
        self._restarts += 1
        member.inputs = []
        member.killed = member.process
        kill(member.handle, no_restart=False)

    async def _recover(self, member: Member[A]) -> None:
        """Start a killed member again: at once, or after a pause if it is missing."""
        pause_s = _FIRST_PAUSE_S
        while True:
            if member.missing:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if await self._try_start(member):
                break
            if self._places.fatal is not None or member not in self._members:
                return
            if member.process != member.killed:
                self._kill(member)  # it is up, but its start failed or hangs
        await self._log.add(EventRecord(name=f"{member.name} is back"))

    async def _try_start(self, member: Member[A]) -> bool:
        """Whether it is ready for calls."""
        try:
            await self._start(member)
        except UserError as error:
            member.absent = True
            if not await self._dismissed(member, str(error)):
                await self._miss(member, error)
            return False
        member.absent = False
        return True

    async def _dismissed(self, member: Member[A], why: str) -> bool:
        """Whether a member that failed has left the pool for good. Overridden by elastic pools."""
        return False

    async def _miss(self, member: Member[A], error: UserError) -> None:
        """Go on without a member, or end the run if too few are left."""
        joined = [one for one in self._members if one.joining is None]
        left = sum(not one.missing for one in joined)
        others = f"{left} of {len(joined)} {self._role}s are left"
        if left >= self._min_actors:
            detail = f"{error}; {others}, and it is tried again"
            await self._log.add(EventRecord(name=f"{member.name} is missing", detail=detail))
        elif len(joined) == 1:
            self._places.give_up(error)
        else:
            minimum = f"min_actors = {self._min_actors}"
            self._places.give_up(ClusterError(f"{error}; {others}, {minimum}"))

    def _refuse_if_given_up(self, name: str) -> None:
        if self._suspects.is_given_up(name):
            raise InputGivenUp(f"{name} was given up before: {self._role}s failed at it")

    def _blamed(self) -> str:
        names = self._suspects.failed_alone
        return f". Failures with one input alone: {', '.join(names)}" if names else ""

    def _why_given_up(self, name: str, last: str) -> str:
        return (
            f"{name}: {MAX_ALONE} {self._role}s failed at it, one after the other, while they had"
            f" nothing else to do, the last one with: {last}; the log of its node has the details"
        )
