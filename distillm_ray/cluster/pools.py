"""Pools of actors, and the policy for what fails in them.

A call goes to the member with the fewest calls in flight. What raises, hangs past its limit or dies
is killed; Ray restarts it, on another node if need be, and it comes back with the newest weights.
Ray never retries a call by itself: a retried generation would sample other tokens under the old
metadata. Instead the caller hears `ActorLost` and decides. `MAX_FAILURES` failures of a member
without a success in between end the run, because something is wrong that a restart cannot mend;
so do as many crashes while it starts, and whatever its `start` raises.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import ray
from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from distillm_ray.config import SamplingConfig
from distillm_ray.errors import ClusterError, UserError
from distillm_ray.report.records import EventRecord
from distillm_ray.rollout.loop import ActorLost, Log
from distillm_ray.types import Demand, Prompt, Rollout, ScoreReport, Weights

MAX_FAILURES = 3
STORE_TIMEOUT_S = 60.0
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
            raise ActorLost(f"{member.name}: {_one_line(error)}") from error
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
                        latest = _one_line(error)
                        if crashes == MAX_FAILURES:
                            raise
                        await asyncio.sleep(_RESTART_POLL_S)
        except RayError as error:
            cause = _cause(error)
            if isinstance(cause, UserError):
                raise cause from error
            raise ClusterError(f"{member.name} did not start: {_one_line(error)}") from error
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
        cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from error
        if member.life != life:
            return  # another of its calls has seen to it
        member.failures += 1
        self._kill(member)
        await self._log.add(EventRecord(name=f"{member.name} failed", detail=_one_line(error)))
        if member.failures >= MAX_FAILURES:
            fatal = ClusterError(
                f"{member.name} failed {member.failures} times in a row, the last time with:"
                f" {_one_line(error)}; see the log of its node for the whole story"
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


class Generators(ActorPool):
    """A pool of `GeneratorActor`s that all follow the newest published weights."""

    def __init__(self, handles: Sequence[Actor], *, keep_in_flight: bool, **settings: Any) -> None:
        super().__init__(handles, role="generator", **settings)
        self._keep_in_flight = keep_in_flight
        self._newest: Weights | None = None

    async def generate(self, demand: Demand) -> Rollout:
        """See `loop.GeneratorPool`."""
        return await self.call(lambda handle: handle.generate.remote(demand))

    async def answer(self, prompt: Prompt, sampling: SamplingConfig, seed: int) -> Rollout:
        """See `loop.GeneratorPool`."""
        while True:  # the pool itself limits how often a member may fail
            try:
                return await self.call(lambda handle: handle.answer.remote(prompt, sampling, seed))
            except ActorLost:
                continue

    async def update(self, weights: Weights) -> float:
        """Bring every ready member to these weights; a member that fails at it is replaced.

        Members that are just starting take them when they have started.
        """
        self._newest = weights
        members = [member for member in self._members if member.ready.is_set()]
        return max(await asyncio.gather(*(self._update(member) for member in members)), default=0.0)

    async def rewind(self) -> None:
        """The learners went back in time: forget all weights published since the start."""
        self._newest = None
        await self.restart()

    async def _update(self, member: Member) -> float:
        life = member.life
        try:
            return await self._bring(member)
        except (RayError, TimeoutError) as error:
            await self._replace(member, life, error)
            return 0.0

    async def _prepare(self, member: Member) -> None:
        taken = None
        while self._newest is not taken:  # newer ones may come meanwhile
            taken = self._newest
            await self._bring(member)

    async def _bring(self, member: Member) -> float:
        assert self._newest is not None
        call = member.handle.update_weights.remote(self._newest, self._keep_in_flight)
        try:
            return await asyncio.wait_for(call, self._call_timeout_s)
        except RayError as error:
            if not isinstance(_cause(error), ObjectLostError):
                raise
            # They went with the learner that had published them. The one that takes its place
            # publishes anew, and until then no demand asks for more than is here.
            return 0.0


class Targets(ActorPool):
    """Scorers in front of the target stores. A payload goes from scorer to store by reference."""

    def __init__(
        self,
        handles: Sequence[Actor],
        stores: Sequence[Actor],
        **settings: Any,
    ) -> None:
        super().__init__(handles, role="scorer", **settings)
        self._stores = stores
        self._under_way: dict[str, asyncio.Future[None]] = {}

    async def ensure(self, rollout: Rollout) -> int:
        """See `loop.TargetService`. The same sequence is never scored twice at once."""
        rollout_id = rollout.rollout_id
        while rollout_id in self._under_way:
            await asyncio.wait((self._under_way[rollout_id],))
        done = self._under_way[rollout_id] = asyncio.get_running_loop().create_future()
        try:
            return await self._ensure(rollout)
        finally:
            del self._under_way[rollout_id]
            done.set_result(None)

    async def _ensure(self, rollout: Rollout) -> int:
        index = store_index(rollout.rollout_id, len(self._stores))
        has = self._stores[index].has.remote(rollout.rollout_id)
        try:
            if await asyncio.wait_for(has, STORE_TIMEOUT_S):
                return 0
        except (RayError, TimeoutError) as error:
            raise ClusterError(
                f"target store {index} did not answer within {STORE_TIMEOUT_S:g} s:"
                f" {_one_line(error)}"
            ) from error
        return await self.replace(rollout)

    async def replace(self, rollout: Rollout) -> int:
        """See `loop.TargetService`. The pool itself limits how often a scorer may fail."""
        store = self._stores[store_index(rollout.rollout_id, len(self._stores))]
        while True:
            try:
                report = await self.call(lambda handle: _score(handle, rollout, store))
            except ActorLost:
                continue
            return report.num_tokens


def store_index(rollout_id: str, num_stores: int) -> int:
    """Which store owns a sequence's targets: the same on every process and in every run."""
    return zlib.crc32(rollout_id.encode()) % num_stores


async def _score(handle: Actor, rollout: Rollout, store: Actor) -> ScoreReport:
    """Score and store. Only the metadata is awaited here; the payload never comes by."""
    report_ref, payload_ref = handle.score.options(num_returns=2).remote(rollout)
    report: ScoreReport = await report_ref
    await store.put.remote(rollout.rollout_id, payload_ref, report.nbytes)
    return report


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the actor, where Ray hands on what was raised there."""
    return error.cause if isinstance(error, RayTaskError) else error


def _one_line(error: BaseException, limit: int = 300) -> str:
    cause = _cause(error)
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
