"""A prompt that kills the process of every generator, in a run with a real buffer and actors."""

from __future__ import annotations

import asyncio
import math
from typing import Any, cast

import numpy as np
import pytest

from distillm_ray.cluster.orchestrator_loop import Orchestrator
from distillm_ray.cluster.pool import InputGivenUp
from distillm_ray.cluster.rollout import GeneratorPool
from distillm_ray.cluster.suspects import MAX_ALONE, MAX_SHARED
from distillm_ray.config import FilterConfig, GeneratorPoolConfig, SamplingConfig
from distillm_ray.replay.buffer import ReplayBuffer
from distillm_ray.replay.schedule import Schedule
from distillm_ray.types import Rollout, Shelf, Validation
from tests import make
from tests.integration.actors import Events, Producer, remote
from tests.integration.fakes import DemandedGenerator

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
]

STEPS, BATCH_SIZE = 6, 8
MAX_IN_FLIGHT = 8
PROMPTS = [f"p{index}" for index in range(15)]


def buffer_of(prompts: list[str]) -> ReplayBuffer:
    """Strictly fresh text, twelve ordinals open at a time or more."""
    return ReplayBuffer(
        prompts=[make.prompt(name) for name in prompts],
        demonstrations=[],
        schedule=Schedule(phi=1.0, total_steps=STEPS, ratio="none"),
        batch_size=BATCH_SIZE,
        capacity=64,
        min_size=BATCH_SIZE,
        lookahead=2,
        sync_interval=1,
        validation_interval=STEPS,
        seed=0,
    )


async def run(buffer: ReplayBuffer, num_generators: int, log: Events) -> list[tuple[int, str]]:
    """Run all steps; returns ordinal and prompt of every fresh sequence, in order."""
    pool = GeneratorPool(
        [remote(DemandedGenerator) for _ in range(num_generators)],
        GeneratorPoolConfig(max_in_flight=MAX_IN_FLIGHT, stall_timeout_s=60.0),
        keep_in_flight=True,
        startup_timeout_s=120.0,
        log=cast(Any, log),
    )
    producer = Producer(buffer)
    loop = Orchestrator(
        buffer=cast(Any, producer),
        generators=pool,
        scorers=None,
        log=cast(Any, log),
        response_filter=FilterConfig(),
    )
    await loop.start()
    running = asyncio.create_task(loop.run())
    trained: list[tuple[int, str]] = []
    buffer.report(Validation(step=0, loss=1.0, tokens=1))
    for step in range(STEPS):
        while not buffer.ready(step):
            assert not running.done(), running.result()
            await asyncio.sleep(0.01)
        trained += sorted(
            (one.rollout.ordinal or 0, one.rollout.prompt_id)
            for one in buffer.draw(step).sequences
            if one.shelf is Shelf.FRESH
        )
        buffer.advance(step + 1)
        producer.changed.set()
    await loop.finish()
    await running
    return trained


@pytest.mark.parametrize("num_generators", [1, 2])
async def test_a_prompt_that_kills_every_generator_is_given_up_and_the_run_completes(
    num_generators: int,
) -> None:
    log = Events()
    prompts = [*PROMPTS[:7], "die", *PROMPTS[7:]]
    async with asyncio.timeout(300):
        trained = await run(buffer_of(prompts), num_generators, log)
    assert [ordinal for ordinal, _ in trained] == list(range(STEPS * BATCH_SIZE))
    assert "die" not in {prompt_id for _, prompt_id in trained}
    failures = sum(name.endswith("failed") for name in log.names)
    halvings = math.ceil(math.log2(MAX_IN_FLIGHT))
    assert MAX_ALONE <= failures <= MAX_SHARED + halvings + MAX_ALONE
    (detail,) = [
        detail
        for name, detail in zip(log.names, log.details, strict=True)
        if name == "prompt given up"
    ]
    assert detail.startswith("prompt die of the training data: 3 generators failed at it")
    assert not any(name.endswith("missing") for name in log.names)
    # Each other ordinal has the prompt that it has without the one that was given up.
    undisturbed = buffer_of(prompts)
    order = [prompts[number] for number in undisturbed._ordinals.prompts(0, len(trained))]
    differ = [index for index, (_, got) in enumerate(trained) if got != order[index]]
    assert differ == np.flatnonzero(np.array(order) == "die").tolist()


async def test_a_prompt_outside_of_the_demand_that_kills_every_generator_ends_with_its_name() -> (
    None
):
    pool = GeneratorPool(
        [remote(DemandedGenerator) for _ in range(2)],
        GeneratorPoolConfig(max_in_flight=MAX_IN_FLIGHT, stall_timeout_s=60.0),
        keep_in_flight=True,
        startup_timeout_s=120.0,
        log=cast(Any, Events()),
    )
    await pool.start()
    greedy = SamplingConfig(temperature=0.0)
    texts = [*PROMPTS, "die"]
    calls = [pool.respond(make.prompt(text, text=text), greedy, 0) for text in texts]
    async with asyncio.timeout(120):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, Rollout) for result in results[:-1])
    with pytest.raises(InputGivenUp, match=r"^prompt die: 3 generators failed at it"):
        raise cast(BaseException, results[-1])
