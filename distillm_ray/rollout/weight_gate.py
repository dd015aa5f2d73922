"""Coordinates the requests and the weight updates of one engine.

    request ──► wait for min_version and for a running update ──► engine
    update  ──► wait for an earlier update ──► [drain requests] ──► load
    close   ──► wait for a running update ──► drain requests; `open` admits again

Weights are known here by their version only: the number of completed optimizer steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class WeightGate:
    """Admits requests and weight updates.

    Loading, and a request's wait for weights that nobody loads, take at most `timeout_s`. Draining
    has no limit of its own: each request in flight has one.
    """

    def __init__(self, timeout_s: float) -> None:
        self._version = 0
        self._timeout_s = timeout_s
        self._updating = False
        self._closed = False
        self._broken = False  # an update failed, so the engine's weights are unknown
        self._in_flight = 0
        self._changed = asyncio.Condition()  # notified when any of the fields above changes

    @property
    def version(self) -> int:
        """Of the weights in use."""
        return self._version

    @asynccontextmanager
    async def request(self, name: str, min_version: int) -> AsyncIterator[int]:
        """Admit a request once the weights are `min_version` or newer; yields their version.

        If an update lands between admission and the request's first engine step, the yielded
        version is older than the weights used: ages may be overstated, never understated.

        Raises:
            TimeoutError: nothing happened here for too long.
            RuntimeError: an update failed.
        """
        version = await self._enter(name, min_version)
        try:
            yield version
        finally:
            await self._leave()

    async def update(
        self, version: int, load: Callable[[], Awaitable[None]], *, keep_in_flight: bool
    ) -> float:
        """Run `load`; returns the seconds it took, draining included, or 0 for an old version.

        New requests wait until the update ends. With `keep_in_flight` admitted requests continue
        during the update; without, they finish first.

        Raises:
            TimeoutError: loading took too long.
            RuntimeError: an earlier update failed.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._broken or not (self._updating or self._closed)
            )
            self._check()
            if version <= self._version:
                return 0.0
            self._updating = True
        start = time.monotonic()
        loaded = False
        try:
            if not keep_in_flight:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._in_flight == 0)
            async with asyncio.timeout(self._timeout_s):
                await load()
            loaded = True
        except TimeoutError as error:
            raise TimeoutError(
                f"weights of version {version} were not loaded after rollout.stall_timeout_s"
                f" = {self._timeout_s:g} s ({self._in_flight} requests in flight)"
            ) from error
        finally:
            async with self._changed:
                self._updating = False
                self._broken = not loaded
                if loaded:
                    self._version = version
                self._changed.notify_all()
        return time.monotonic() - start

    async def close(self) -> None:
        """Admit nothing more, and return when no request is in flight.

        What waits here meanwhile is admitted after `open`. Closing twice changes nothing.

        Raises:
            RuntimeError: an update failed.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._broken or not self._updating)
            self._check()
            self._closed = True
            await self._changed.wait_for(lambda: self._in_flight == 0)

    async def open(self) -> None:
        """Admit requests and updates again."""
        async with self._changed:
            self._closed = False
            self._changed.notify_all()

    async def _enter(self, name: str, min_version: int) -> int:
        try:
            async with self._changed:
                while not self._broken and (
                    self._updating or self._closed or self._version < min_version
                ):
                    # An update has its own limits, and a gate is closed for as long as its owner
                    # wants; every change here starts the wait anew.
                    unlimited = self._updating or self._closed
                    async with asyncio.timeout(None if unlimited else self._timeout_s):
                        await self._changed.wait()
                self._check()
                self._in_flight += 1
                return self._version
        except TimeoutError as error:
            raise TimeoutError(
                f"{name} waited rollout.stall_timeout_s = {self._timeout_s:g} s for weights of"
                f" version {min_version}; the generator has version {self._version}"
            ) from error

    async def _leave(self) -> None:
        self._in_flight -= 1
        async with self._changed:
            self._changed.notify_all()

    def _check(self) -> None:
        if self._broken:
            raise RuntimeError(
                f"a weight update after version {self._version} failed: this generator may hold a"
                " mixture of weights and must be replaced"
            )
