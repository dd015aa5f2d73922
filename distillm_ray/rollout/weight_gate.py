"""Which request starts with which weights: between an engine, its users and the updates.

    request ──► wait for its weights, and for no update ──► engine
    update  ──► wait for the update before it ──► load, with requests in flight or after the last

It knows the weights by their version only, the number of completed optimizer steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class WeightGate:
    """Lets requests and weight updates of one engine pass, each for at most `timeout_s`."""

    def __init__(self, version: int, timeout_s: float) -> None:
        self._version = version
        self._timeout_s = timeout_s
        self._updating = False
        self._broken = False  # an update failed: nobody knows which weights the engine holds
        self._in_flight = 0
        self._busy_since = 0.0
        self._busy_seconds = 0.0
        self._changed = asyncio.Condition()  # version, the flags or _in_flight changed

    @property
    def version(self) -> int:
        """Of the weights in use."""
        return self._version

    @property
    def in_flight(self) -> int:
        """Requests inside."""
        return self._in_flight

    @property
    def busy_seconds(self) -> float:
        """Seconds with at least one request inside."""
        running = time.monotonic() - self._busy_since if self._in_flight else 0.0
        return self._busy_seconds + running

    @asynccontextmanager
    async def request(self, name: str, min_version: int) -> AsyncIterator[int]:
        """Be inside with weights of `min_version` or newer; gives the version at the start.

        A request that an update overtakes before its first engine step is recorded as one update
        older than it is: ages are never understated. Raises TimeoutError if they do not come, and
        RuntimeError after a failed update.
        """
        version = await self._enter(name, min_version)
        try:
            yield version
        finally:
            await self._leave()

    async def update(
        self, version: int, load: Callable[[], Awaitable[None]], *, keep_in_flight: bool
    ) -> float | None:
        """Load these weights; returns the seconds that it took, None for a version not above ours.

        With `keep_in_flight` requests stay inside meanwhile; without, they leave first. New ones
        wait either way. Raises TimeoutError. After any failure every later call raises
        RuntimeError.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._broken or not self._updating)
            self._check()
            if version <= self._version:
                return None
            self._updating = True
        start = time.monotonic()
        loaded = False
        try:
            async with asyncio.timeout(self._timeout_s):
                if not keep_in_flight:
                    async with self._changed:
                        await self._changed.wait_for(lambda: self._in_flight == 0)
                await load()
            loaded = True
        except TimeoutError as error:
            raise TimeoutError(
                f"weights of version {version} were not in place after rollout.timeout_s ="
                f" {self._timeout_s:g} s ({self._in_flight} requests in flight)"
            ) from error
        finally:
            async with self._changed:
                self._updating = False
                self._broken = not loaded
                if loaded:
                    self._version = version
                self._changed.notify_all()
        return time.monotonic() - start

    async def _enter(self, name: str, min_version: int) -> int:
        try:
            async with asyncio.timeout(self._timeout_s), self._changed:
                await self._changed.wait_for(
                    lambda: self._broken or (not self._updating and self._version >= min_version)
                )
                self._check()
                if self._in_flight == 0:
                    self._busy_since = time.monotonic()
                self._in_flight += 1
                return self._version
        except TimeoutError as error:
            raise TimeoutError(
                f"{name} waited rollout.timeout_s = {self._timeout_s:g} s for weights of version"
                f" {min_version}; here is version {self._version}"
                + (", an update is under way" if self._updating else "")
            ) from error

    async def _leave(self) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._busy_seconds += time.monotonic() - self._busy_since
        async with self._changed:
            self._changed.notify_all()

    def _check(self) -> None:
        if self._broken:
            raise RuntimeError(
                f"a weight update after version {self._version} failed: this generator may hold a"
                " mixture of weights and must be replaced"
            )
