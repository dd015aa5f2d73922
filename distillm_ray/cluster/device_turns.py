"""Turns on shared devices, carried out: work waits for its turn, engines sleep and wake.

turns.py decides, this file does. It is part of the orchestrator, which knows what the generators
work on; learner_turn.py is the learners' side.

    wait                        ends when                             limit
    ------------------------    ----------------------------------    ---------------------------
    for the generators' turn    the ranks lend or have ended, and     none: steps take as long as
                                the engines are awake                 they take
    for the learners' turn      the generators' work has ended, and   `timeout_s`; the rank asks
                                the engines are asleep                again (learner_turn.py)
    for engines                 all of them sleep, or wake            the pool's

Without ranks, all turns are the generators': nothing ever waits or sleeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from distillm_ray.cluster.turns import Engines, Turns


async def _nothing() -> None:
    """There are no engines."""


class DeviceTurns:
    """Keeps the turns of one run.

    Args:
        ranks: learners that share their devices with generators.
    """

    def __init__(self, ranks: int = 0) -> None:
        self._turns = Turns.of(ranks=ranks)
        self._sleep: Callable[[], Awaitable[None]] = _nothing
        self._wake: Callable[[], Awaitable[None]] = _nothing
        self._waiting: list[asyncio.Future[None]] = []
        self._change: asyncio.Task[None] | None = None  # of the engines
        self._failure: BaseException | None = None

    def control(
        self, sleep: Callable[[], Awaitable[None]], wake: Callable[[], Awaitable[None]]
    ) -> None:
        """Name what puts all engines to sleep and what wakes them.

        An exception of either is raised to all who wait for a turn, then and later.
        """
        self._sleep, self._wake = sleep, wake

    @property
    def learners_hold(self) -> bool:
        """Whether it is the learners' turn."""
        return self._turns.learners_hold

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Work of the generators: waits for their turn, and keeps it until the end of the block."""
        self._become(self._turns.arrives())
        try:
            await self._until(lambda: self._turns.admits)
        except BaseException:
            self._become(self._turns.withdraws())
            raise
        self._become(self._turns.enters())
        try:
            yield
        finally:
            self._become(self._turns.leaves())

    async def take(self, attempt: int, rank: int, *, hurried: bool, timeout_s: float) -> bool:
        """A rank asks for its device; returns whether it has it after `timeout_s` at most."""
        self._become(self._turns.asks(attempt=attempt, rank=rank, hurried=hurried))
        try:
            async with asyncio.timeout(timeout_s):
                await self._until(lambda: self._turns.granted(rank))
        except TimeoutError:
            return False
        return True

    def lend(self, attempt: int, rank: int) -> None:
        """A rank has freed its device and waits for the generators."""
        self._become(self._turns.lends(attempt=attempt, rank=rank))

    def end(self) -> None:
        """The learners have ended: all turns are the generators'."""
        self._become(self._turns.ended())

    async def _until(self, holds: Callable[[], bool]) -> None:
        while self._failure is None and not holds():
            change = asyncio.get_running_loop().create_future()
            self._waiting.append(change)
            await change
        if self._failure is not None:
            raise self._failure

    def _become(self, turns: Turns) -> None:
        before, self._turns = self._turns.engines, turns
        if turns.engines is not before and turns.engines in (
            Engines.FALLING_ASLEEP,
            Engines.WAKING,
        ):
            self._change = asyncio.create_task(self._carry_out(turns.engines))
        self._notify()

    async def _carry_out(self, change: Engines) -> None:
        try:
            if change is Engines.WAKING:
                await self._wake()
                self._become(self._turns.woke())
            else:
                await self._sleep()
                self._become(self._turns.slept())
        except BaseException as error:
            self._failure = error  # raised by `_until`
            self._notify()

    def _notify(self) -> None:
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            if not change.done():
                change.set_result(None)
