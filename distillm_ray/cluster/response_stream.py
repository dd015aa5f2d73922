"""Many prompts through a pool of generators with a bounded number of them in flight.

    driver ── exchange(new prompts) ──► stream ── one call each ──► GeneratorPool
       ▲                                   │
       └────── the responses that ended ───┘

wait            ends when                                  limit
------------    ---------------------------------------    -------------------------------
`exchange`      at least one response is there             the pool's, for each response

The driver decides how many prompts are in flight by how many it sends. Responses that end while it
is busy are handed over together, so that the fastest model costs few calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from distillm_ray.types import Prompt, Rollout

Respond: TypeAlias = Callable[[Prompt], Awaitable[Rollout]]


class ResponseStream:
    """Prompts in flight, and the responses that nobody has taken yet. Plain: no cluster."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Rollout]] = set()
        self._ended: list[asyncio.Task[Rollout]] = []
        self._any_ended = asyncio.Event()

    async def exchange(self, prompts: Sequence[Prompt], respond: Respond) -> list[Rollout]:
        """Start with these prompts; returns all responses that ended since the last call.

        Waits for one if there is none. Raises what `respond` raised.
        """
        for prompt in prompts:
            task = asyncio.create_task(_started(respond, prompt))
            self._running.add(task)
            task.add_done_callback(self._end)
        assert self._running or self._ended, "no prompt is in flight"
        await self._any_ended.wait()
        self._any_ended.clear()
        ended, self._ended = self._ended, []
        return [task.result() for task in ended]

    def _end(self, task: asyncio.Task[Rollout]) -> None:
        self._running.discard(task)
        self._ended.append(task)
        self._any_ended.set()


async def _started(respond: Respond, prompt: Prompt) -> Rollout:
    return await respond(prompt)
