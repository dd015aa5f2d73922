"""Requests wait for a batch together; nobody waits forever, and one failure is its batch's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from distillm_ray.dynamic_batching import DynamicBatcher

LIMIT_S = 20


class Model:
    """Doubles numbers, one batch at a time, each when the test lets it."""

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
        """Returns when the next batch has begun."""
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
    """Calls that have all arrived when this returns."""
    calls = [asyncio.create_task(batcher.call(number)) for number in numbers]
    await asyncio.sleep(0)
    return calls


async def test_what_waits_while_a_batch_runs_is_answered_together_as_far_as_it_fits() -> None:
    model = Model()
    async with started(model) as batcher:
        calls = await ask(batcher, 1)
        await model.running()
        calls += await ask(batcher, 4, 5, 3, 1)
        model.release(3)
        assert await asyncio.gather(*calls) == [2, 8, 10, 6, 2]
    assert model.batches == [[1], [4, 5, 1], [3]]


async def test_a_request_that_fits_beside_nothing_is_answered_alone_when_it_is_the_oldest() -> None:
    model = Model()
    async with started(model) as batcher:
        calls = await ask(batcher, 1)
        await model.running()
        calls += await ask(batcher, 50, 2)
        model.release(3)
        assert await asyncio.gather(*calls) == [2, 100, 4]
    assert model.batches == [[1], [50], [2]]


async def test_a_failure_reaches_all_callers_of_its_batch_and_no_other() -> None:
    model = Model()
    async with started(model) as batcher:
        calls = await ask(batcher, 1)
        await model.running()
        calls += await ask(batcher, 13, -4, 2)
        model.release(3)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(answer) for answer in answers] == ["2", "13", "13", "4"]
    assert model.batches == [[1], [13, -4], [2]]


async def test_a_caller_that_gave_up_is_not_computed_for_and_holds_nobody_up() -> None:
    model = Model()
    async with started(model) as batcher:
        gone_early, gone_late, patient = await ask(batcher, 2, 3, 4)
        gone_early.cancel()
        await model.running()
        gone_late.cancel()
        model.release(1)
        assert await patient == 8
    assert model.batches == [[3, 4]]


async def test_stop_lets_the_running_batch_end_and_cancels_what_waits() -> None:
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


async def test_whoever_holds_the_lock_has_the_model_to_itself() -> None:
    model = Model()
    async with started(model) as batcher:
        async with batcher.between_batches:
            (call,) = await ask(batcher, 1)
            await asyncio.sleep(0.05)
            assert model.batches == []
        model.release(1)
        assert await call == 2
