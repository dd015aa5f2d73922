"""A member of a pool: one actor, whose process may be replaced under the same handle."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import ray
from ray.actor import ActorProxy

from distillm_ray.cluster.busy_clock import BusyClock
from distillm_ray.cluster.reporter import Reporting

MAX_FAILURES = 3


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

    @ray.method
    async def silent_s(self) -> float:
        """For how many seconds it has not got on with its calls; 0 if it owes nothing."""
        raise NotImplementedError


A = TypeVar("A", bound=PooledActor)


@dataclass(slots=True, eq=False)
class Member(Generic[A]):
    """One actor of a pool."""

    name: str
    handle: ActorProxy[A]
    in_flight: int = 0
    inputs: list[str] = field(default_factory=list)  # of the calls in flight in this life
    company: int | None = None  # how many suspects it may have, and nothing else; None: no suspect
    failures: int = 0  # without a success in between
    absent: bool = False  # its latest start failed
    life: int = 0  # how often it was replaced
    process: str = ""  # the process that started last
    killed: str = ""  # the process that was killed last, which may still reply for a while
    looked: float = 0.0  # when it was last seen to get on, on the monotonic clock
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    busy: BusyClock = field(default_factory=BusyClock)
    # Of an elastic pool:
    added: bool = False  # the pool has started it, and may release it
    joining: asyncio.Task[None] | None = None  # its first start
    draining: bool = False  # it gets no more calls, and is released when it has none

    @property
    def missing(self) -> bool:
        """Whether the pool does not count on it."""
        return self.absent or self.failures >= MAX_FAILURES

    @property
    def takes_calls(self) -> bool:
        """Whether it may get one more call, places permitting."""
        return self.ready.is_set() and not self.draining
