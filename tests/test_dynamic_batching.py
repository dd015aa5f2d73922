"""Requests are batched, none waits forever, and a failure reaches only its own batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from distillm_ray.dynamic_batching import DynamicBatcher

LIMIT_S = 20


class Model:
    """Doubles numbers; each batch returns when the test releases it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, numbers: list[int]) -> Sequence[int]:
        self.batches.append(numbers)
        self.begun.release()
        assert self.go.acquire(timeout=LIMIT_S)
        if 13 in numbers:
            raise ValueError("13")
        return [2 * number for number in numbers]

    async def running(self) -> None:
        """Wait until the next batch has begun."""
        assert await asyncio.to_thread(self.begun.acquire, timeout=LIMIT_S)

    def release(self, batches: int) -> None:
        for _ in range(batches):
            self.go.release()


def at_most_ten(batch: list[int], number: int) -> bool:
    return sum(batch) + number <= 10


@asynccontextmanager
async def started(model: Model) -> AsyncIterator[DynamicBatcher[int, int]]:
    batcher = DynamicBatcher(model, at_most_ten)
    batcher.start()
    try:
        yield batcher
    finally:
        model.release(100)
        await batcher.stop()


async def ask(batcher: DynamicBatcher[int, int], *numbers: int) -> list[asyncio.Task[int]]:
    """Start calls; all are queued when this returns."""
    calls = [asyncio.create_task(batcher.call(number)) for number in numbers]
    await asyncio.sleep(0)
    return calls


async def test_requests_that_arrive_during_a_batch_form_the_next_one_as_far_as_they_fit() -> None:
    model = Model()
    async with started(model) as batcher:
        calls = await ask(batcher, 1)
        await model.running()
        calls += await ask(batcher, 4, 5, 3, 1)
        model.release(3)
        assert await asyncio.gather(*calls) == [2, 8, 10, 6, 2]
    assert model.batches == [[1], [4, 5, 1], [3]]


async def test_a_request_that_fits_with_no_other_runs_alone_when_it_is_the_oldest() -> None:
    model = Model()
    async with started(model) as batcher:
        calls = await ask(batcher, 1)
        await model.running()
        calls += await ask(batcher, 50, 2)
        model.release(3)
        assert await asyncio.gather(*calls) == [2, 100, 4]
    assert model.batches == [[1], [50], [2]]


async def test_a_failure_reaches_the_callers_of_its_batch_and_no_others() -> None:
    model = Model()
    async with started(model) as batcher:
        calls = await ask(batcher, 1)
        await model.running()
        calls += await ask(batcher, 13, -4, 2)
        model.release(3)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(result) for result in results] == ["2", "13", "13", "4"]
    assert model.batches == [[1], [13, -4], [2]]


async def test_a_cancelled_request_is_not_computed_and_does_not_delay_others() -> None:
    model = Model()
    async with started(model) as batcher:
        gone_early, gone_late, patient = await ask(batcher, 2, 3, 4)
        gone_early.cancel()
        await model.running()
        gone_late.cancel()
        model.release(1)
        assert await patient == 8
    assert model.batches == [[3, 4]]


async def test_stop_finishes_the_running_batch_and_cancels_queued_requests() -> None:
    model = Model()
    batcher = DynamicBatcher(model, at_most_ten)
    batcher.start()
    (running,) = await ask(batcher, 1)
    await model.running()
    (waiting,) = await ask(batcher, 2)
    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(0)
    assert not stopping.done()
    model.release(1)
    await asyncio.wait_for(stopping, LIMIT_S)
    assert await running == 2
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert model.batches == [[1]]


async def test_no_batch_runs_while_the_lock_is_held() -> None:
    model = Model()
    async with started(model) as batcher:
        async with batcher.between_batches:
            (call,) = await ask(batcher, 1)
            await asyncio.sleep(0.05)
            assert model.batches == []
        model.release(1)
        assert await call == 2


async def test_a_wrong_number_of_results_fails_the_batch_and_not_the_batcher() -> None:
    batcher: DynamicBatcher[int, int] = DynamicBatcher(
        lambda numbers: [0] if numbers == [3] else [], lambda _batch, _number: False
    )
    batcher.start()
    with pytest.raises(RuntimeError, match="a batch of 1 requests got 0 results"):
        await asyncio.wait_for(batcher.call(2), LIMIT_S)
    assert await asyncio.wait_for(batcher.call(3), LIMIT_S) == 0
    await batcher.stop()
    with pytest.raises(AssertionError, match="not running"):
        await batcher.call(3)
