"""Dynamic batching: requests that arrive while a batch runs form the next one.

call ──► queue ──► the oldest request and those that fit with it ──► compute, in a thread
  ▲                                                                         │
  └──────────────────────────────── results ◄───────────────────────────────┘
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from distillm_ray.activity import Activity

Request = TypeVar("Request")
Result = TypeVar("Result")


class DynamicBatcher(Generic[Request, Result]):
    """Computes single requests in batches, one batch at a time.

    Args:
        compute: computes one batch outside of the event loop and returns one result per request.
            An exception reaches every caller of the batch.
        fits: whether a request may join the given batch. The oldest request always starts one, so
            no request waits forever.
    """

    def __init__(
        self,
        compute: Callable[[list[Request]], Sequence[Result]],
        fits: Callable[[list[Request], Request], bool],
    ) -> None:
        self._compute = compute
        self._fits = fits
        self._waiting: list[tuple[Request, asyncio.Future[Result]]] = []
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._activity = Activity()
        self.between_batches = asyncio.Lock()
        """No batch runs while this is held."""

    def start(self) -> None:
        """Begin to compute, in the running event loop."""
        self._task = asyncio.create_task(self._run_batches())

    async def stop(self) -> None:
        """Stop after the running batch; queued requests are cancelled."""
        async with self.between_batches:
            if self._task is not None:
                self._task.cancel()
                self._task = None
            for _, future in self._waiting:
                future.cancel()
            self._waiting.clear()

    async def call(self, request: Request) -> Result:
        """The result of one request; waits for the batch that contains it."""
        assert self._task is not None, "the batcher is not running: nothing would compute this"
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._arrived.set()
        return await future

    @property
    def silent_s(self) -> float:
        """Seconds since the running batch began; 0 if none runs."""
        return self._activity.silent_s

    async def _run_batches(self) -> None:
        while True:
            await self._arrived.wait()
            async with self.between_batches:
                batch = self._take()
                if batch:
                    await self._run_batch(batch)
            if not self._waiting:
                self._arrived.clear()

    def _take(self) -> list[tuple[Request, asyncio.Future[Result]]]:
        batch: list[tuple[Request, asyncio.Future[Result]]] = []
        left: list[tuple[Request, asyncio.Future[Result]]] = []
        for request, future in self._waiting:
            if future.done():
                continue  # its caller was cancelled
            chosen = not batch or self._fits([other for other, _ in batch], request)
            (batch if chosen else left).append((request, future))
        self._waiting = left
        return batch

    async def _run_batch(self, batch: Sequence[tuple[Request, asyncio.Future[Result]]]) -> None:
        requests = [request for request, _ in batch]
        work = asyncio.get_running_loop().run_in_executor(None, self._compute, requests)
        with self._activity.busy():
            await asyncio.wait((work,))
        error = work.exception()
        results = [] if error is not None else work.result()
        if error is None and len(results) != len(batch):
            error = RuntimeError(f"a batch of {len(batch)} requests got {len(results)} results")
        for index, (_, future) in enumerate(batch):
            if future.done():
                continue  # its caller was cancelled meanwhile
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(results[index])
