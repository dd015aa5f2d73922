"""Calls to target stores that are plain objects: who is replaced, and when a store is silent.

What happens when stores die is in tests/integration/test_targets.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, cast

import pytest
from ray.exceptions import ActorUnavailableError, OutOfDiskError, OwnerDiedError

from distillm_ray.cluster import store_calls
from distillm_ray.cluster.store_calls import MAX_STORE_FAILURES, StoreCalls, StoreLost
from distillm_ray.errors import ClusterError
from tests.integration.actors import Events


class Store:
    """Replies after so many seconds, or raises."""

    async def reply(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async def fail(self, error: Exception) -> float:
        raise error


class Calls:
    """Calls to one store, and what was killed and logged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.killed: list[object] = []
        self.log = Events()
        monkeypatch.setattr(store_calls, "STORE_SILENCE_S", 0.2)
        monkeypatch.setattr(
            store_calls, "kill", lambda handle, no_restart: self.killed.append(handle)
        )
        self.store = Store()
        self._calls: StoreCalls[Any] = StoreCalls(cast(Any, [self.store]), log=cast(Any, self.log))

    def reply(self, seconds: float) -> Awaitable[float]:
        return self._calls.call(0, lambda store: cast(Any, store).reply(seconds))

    def fail(self, error: Exception) -> Awaitable[float]:
        return self._calls.call(0, lambda store: cast(Any, store).fail(error))


async def test_a_silent_store_is_killed_once_for_all_calls_that_it_owes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch)
    owed = await asyncio.gather(*(calls.reply(60) for _ in range(5)), return_exceptions=True)
    assert [type(error) for error in owed] == [StoreLost] * 5
    assert calls.killed == [calls.store]
    assert calls.log.names == ["target store 0 failed"]
    assert await calls.reply(0.0) == 0.0, "the one that takes its place replies"


async def test_a_slow_call_of_a_store_that_replies_to_others_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch)
    slow = asyncio.ensure_future(calls.reply(0.6))
    for _ in range(10):
        await calls.reply(0.06)
    assert await slow == 0.6
    assert calls.killed == []


async def test_a_store_that_is_being_restarted_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch)
    monkeypatch.setattr(store_calls, "_RESTART_POLL_S", 0.01)
    left = [ActorUnavailableError("restarting", None)] * 5

    async def restarting(seconds: float) -> float:
        if left:
            raise left.pop()
        return seconds

    monkeypatch.setattr(calls.store, "reply", restarting)
    assert await calls.reply(1.0) == 1.0
    assert (calls.killed, left) == ([], [])


async def test_a_payload_that_is_lost_on_its_way_replaces_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch)
    for _ in range(MAX_STORE_FAILURES):
        with pytest.raises(StoreLost):
            await calls.fail(OwnerDiedError("ff", None, "scorer"))
    assert calls.killed == []


async def test_a_store_that_fails_again_and_again_ends_the_run_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch)
    for _ in range(2):
        for _ in range(MAX_STORE_FAILURES - 1):
            with pytest.raises(StoreLost):
                await calls.fail(OutOfDiskError("full"))
        await calls.reply(0.0)  # a reply resets the count
    for _ in range(MAX_STORE_FAILURES - 1):
        with pytest.raises(StoreLost):
            await calls.fail(OutOfDiskError("full"))
    with pytest.raises(ClusterError, match=r"^target store 0 failed 3 times in a row.*full"):
        await calls.fail(OutOfDiskError("full"))
