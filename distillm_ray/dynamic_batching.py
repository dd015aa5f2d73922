"""Calls that came while a batch was computed are the next batch: for roles with one model.

call ──► waiting ──► the oldest, and what `fits` beside it ──► answer, in a thread ──► callers
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class DynamicBatcher(Generic[Request, Answer]):
    """Answers single requests in batches, one batch at a time.

    Args:
        answer: computes a batch, outside of the event loop; as many answers as requests. What it
            raises reaches every caller of the batch.
        fits: whether a request may join a batch that begins with others. The oldest request always
            begins one, so that none waits forever.
    """

    def __init__(
        self,
        answer: Callable[[list[Request]], Sequence[Answer]],
        fits: Callable[[list[Request], Request], bool],
    ) -> None:
        self._answer = answer
        self._fits = fits
        self._waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.between_batches = asyncio.Lock()
        """Whoever holds it has the model to itself."""

    def start(self) -> None:
        """Begin to answer, in the running event loop."""
        self._task = asyncio.create_task(self._answer_batches())

    async def stop(self) -> None:
        """End after the running batch; requests that still wait are cancelled."""
        async with self.between_batches:
            if self._task is not None:
                self._task.cancel()
            for _, answer in self._waiting:
                answer.cancel()
            self._waiting.clear()

    async def call(self, request: Request) -> Answer:
        """The answer to one request; waits for the batch that it is in."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        self._arrived.set()
        return await answer

    async def _answer_batches(self) -> None:
        while True:
            await self._arrived.wait()
            async with self.between_batches:
                batch = self._take()
                if batch:
                    await self._answer_batch(batch)
            if not self._waiting:
                self._arrived.clear()

    def _take(self) -> list[tuple[Request, asyncio.Future[Answer]]]:
        batch: list[tuple[Request, asyncio.Future[Answer]]] = []
        left: list[tuple[Request, asyncio.Future[Answer]]] = []
        for request, answer in self._waiting:
            if answer.done():
                continue  # the caller gave up
            chosen = not batch or self._fits([other for other, _ in batch], request)
            (batch if chosen else left).append((request, answer))
        self._waiting = left
        return batch

    async def _answer_batch(self, batch: Sequence[tuple[Request, asyncio.Future[Answer]]]) -> None:
        requests = [request for request, _ in batch]
        work = asyncio.get_running_loop().run_in_executor(None, self._answer, requests)
        await asyncio.wait((work,))
        error = work.exception()
        for index, (_, answer) in enumerate(batch):
            if answer.done():
                continue  # the caller gave up meanwhile
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(work.result()[index])
