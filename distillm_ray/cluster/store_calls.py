"""Calls to the target stores, and what happens when a store fails.

A store that raises or is silent is killed, and Ray restarts it empty, on another node if need be.
The caller gets `StoreLost` and has the sequence scored again: nothing is held against the scorer
whose targets the store did not take. A store that died is asked again: every call may be repeated.

    wait            ends when               limit
    ------------    --------------------    --------------------------------------------------------
    for a call      the store replies       `STORE_SILENCE_S` in which it replies to no call at all

`MAX_STORE_FAILURES` failures of a store without a reply in between end the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ray.actor import ActorProxy
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayError

from distillm_ray.cluster.actors import cause_of, kill, one_line
from distillm_ray.cluster.liveness import while_alive
from distillm_ray.cluster.log import AsyncLog
from distillm_ray.errors import ClusterError, UserError
from distillm_ray.log.records import EventRecord

STORE_SILENCE_S = 60.0  # Ray notices a frozen node after 64 s, so before the second failure
MAX_STORE_FAILURES = 3
_RESTART_POLL_S = 0.2

A = TypeVar("A")
Result = TypeVar("Result")


class StoreLost(Exception):
    """A call to a store failed, or its payload was lost on the way. Score the sequence again."""


@dataclass(slots=True, eq=False)
class _Store(Generic[A]):
    handle: ActorProxy[A]
    failures: int = 0  # without a reply in between
    life: int = 0  # how often it was killed
    replied: float = 0.0  # when, on the monotonic clock


class StoreCalls(Generic[A]):
    """The stores as the orchestrator calls them."""

    def __init__(self, handles: Sequence[ActorProxy[A]], *, log: AsyncLog) -> None:
        self._stores = [_Store(handle) for handle in handles]
        self._log = log

    async def call(
        self, index: int, invoke: Callable[[ActorProxy[A]], Awaitable[Result]]
    ) -> Result:
        """Run `invoke` on a store.

        Raises:
            StoreLost: the store failed and is being replaced, or the payload was lost.
            ClusterError: the store failed too often.
            UserError: what the store raised.
        """
        store = self._stores[index]
        life = store.life
        try:
            result = await while_alive(
                _reply(store.handle, invoke), lambda: store.replied, STORE_SILENCE_S
            )
        except (RayError, TimeoutError) as error:
            cause = cause_of(error)
            if isinstance(cause, UserError):
                raise cause from error
            if not isinstance(cause, ObjectLostError):
                await self._replace(index, life, error)
            raise StoreLost(f"target store {index}: {one_line(error)}") from error
        store.failures = 0
        store.replied = time.monotonic()
        return result

    async def _replace(self, index: int, life: int, error: BaseException) -> None:
        store = self._stores[index]
        if store.life != life:
            return  # another of its calls has already replaced it
        store.life += 1
        store.failures += 1
        kill(store.handle, no_restart=False)
        await self._log.add(
            EventRecord(name=f"target store {index} failed", detail=one_line(error))
        )
        if store.failures >= MAX_STORE_FAILURES:
            raise ClusterError(
                f"target store {index} failed {store.failures} times in a row, the last time with:"
                f" {one_line(error)}; see the log of its node for the details"
            ) from error


async def _reply(
    handle: ActorProxy[A], invoke: Callable[[ActorProxy[A]], Awaitable[Result]]
) -> Result:
    """What the store replies, when its process has been restarted if need be."""
    while True:
        try:
            return await invoke(handle)
        except ActorUnavailableError:
            await asyncio.sleep(_RESTART_POLL_S)
