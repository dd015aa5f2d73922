"""Prompts streamed through a pool: bounded in flight, none lost, errors raised."""

from __future__ import annotations

import asyncio

import pytest

from distillm_ray.cluster.response_stream import ResponseStream
from distillm_ray.errors import ClusterError
from distillm_ray.types import Prompt, Rollout
from tests import make

AT_MOST = 7


def test_no_more_prompts_are_in_flight_than_were_sent_and_all_come_back() -> None:
    in_flight, most = 0, 0

    async def respond(prompt: Prompt) -> Rollout:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        for _ in range(1 + int(prompt.prompt_id) % 5):
            await asyncio.sleep(0)
        in_flight -= 1
        return make.rollout(prompt_id=prompt.prompt_id)

    async def run() -> list[str]:
        stream, found, held = ResponseStream(), [], 0
        rest = [make.prompt(str(index)) for index in range(100)]
        while rest or held:
            new, rest = rest[: AT_MOST - held], rest[AT_MOST - held :]
            ended = await stream.exchange(new, respond)
            assert ended
            held += len(new) - len(ended)
            found += [one.prompt_id for one in ended]
        return found

    assert sorted(asyncio.run(run()), key=int) == [str(index) for index in range(100)]
    assert most == AT_MOST


def test_responses_that_end_between_two_calls_are_returned_together() -> None:
    async def respond(prompt: Prompt) -> Rollout:
        return make.rollout(prompt_id=prompt.prompt_id)

    async def run() -> None:
        stream = ResponseStream()
        gate = asyncio.Event()

        async def late(prompt: Prompt) -> Rollout:
            await gate.wait()
            return make.rollout(prompt_id=prompt.prompt_id)

        assert len(await stream.exchange([make.prompt("a")], respond)) == 1
        waiting = asyncio.create_task(stream.exchange([make.prompt("b"), make.prompt("c")], late))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        gate.set()
        assert {one.prompt_id for one in await waiting} == {"b", "c"}

    asyncio.run(run())


def test_what_a_call_raises_reaches_the_caller() -> None:
    async def fail(prompt: Prompt) -> Rollout:
        raise ClusterError("generator 0 failed 3 times in a row")

    with pytest.raises(ClusterError, match="3 times"):
        asyncio.run(ResponseStream().exchange([make.prompt()], fail))
