"""A wait that lasts as long as the other side is alive, however long its queue is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

Result = TypeVar("Result")


async def while_alive(
    call: Awaitable[Result], last_sign: Callable[[], float], silence_s: float
) -> Result:
    """The result of `call`, awaited as long as its actor gives a sign of life.

    Args:
        last_sign: the time of the latest sign, on the clock of `time.monotonic`.
        silence_s: the wait ends when there was none for so long, since the call or later.

    Raises:
        TimeoutError: the actor was silent.
    """
    started = time.monotonic()
    task = asyncio.ensure_future(call)
    try:
        while not task.done():
            left_s = max(started, last_sign()) + silence_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"no sign of life for {silence_s:g} s")
            await asyncio.wait((task,), timeout=left_s)
        return task.result()
    finally:
        task.cancel()
