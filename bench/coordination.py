"""What coordination costs at scale: the pool, the buffer's actor, its messages and the log.

    python bench/coordination.py [--waiting 1000,8000,100000]

The real classes, called in this process without Ray and without models: calls to fake generators
end one after the other, so what is timed is the coordination alone. A step has
1,024 slots, all of them fresh, and 64 ranks wait for it while its rollouts arrive. The replay
shelf, and so the buffer, holds 100,000 sequences. Messages are pickled as Ray would. Times are of
this process's one thread on the processor, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pickle
import statistics
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time as clock
from types import SimpleNamespace
from typing import Any, TypeAlias, cast
from unittest import mock

import numpy as np
import ray
from _common import commit, write
from rich.console import Console
from rich.table import Table

from distillm_ray.cluster.buffer import BufferActor
from distillm_ray.cluster.rollout import GeneratorPool
from distillm_ray.config import Config, GeneratorPoolConfig, SamplingConfig
from distillm_ray.log.metrics import read_records
from distillm_ray.log.records import BufferSizes, Counters, StepRecord, to_json
from distillm_ray.types import (
    Demand,
    FinishReason,
    Prompt,
    RankPlan,
    Rollout,
    Source,
    TrainingData,
    TrainStep,
    Validation,
    Work,
)

SLOTS, RANKS, HELD = 1024, 64, 100_000
PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 20_000, 200, 250
MEMBERS, MAX_IN_FLIGHT = 8, 64
Actor: TypeAlias = Any  # a `BufferActor`, whose annotations are those of a handle
LINES = 200  # of the log that is read
SETTLE = 4  # turns of the event loop in which those that were woken look and wait again


def prompts() -> list[Prompt]:
    """Prompts and references of a thousand characters each."""
    ids = np.arange(PROMPT_TOKENS, dtype=np.int32)
    reference = np.arange(RESPONSE_TOKENS, dtype=np.int32)
    return [
        Prompt(
            prompt_id=f"train-{index:08d}",
            token_ids=ids,
            reference_ids=(reference,),
            text="word " * 200,
            references=("word " * 200,),
        )
        for index in range(PROMPTS)
    ]


def response(demand: Demand, prompt_ids: np.ndarray) -> Rollout:
    """A response of its own arrays, as one that crossed a process border."""
    return Rollout(
        rollout_id=f"student-{demand.ordinal}",
        prompt_id=demand.prompt_id,
        prompt_ids=prompt_ids,
        response_ids=np.arange(RESPONSE_TOKENS - demand.ordinal % 200, dtype=np.int32),
        loss_mask=np.ones(RESPONSE_TOKENS - demand.ordinal % 200, dtype=np.bool_),
        source=Source.STUDENT,
        version=demand.min_version,
        finish_reason=FinishReason.STOP,
        ordinal=demand.ordinal,
    )


# ---- the pool ------------------------------------------------------------------------------------


class FakeGenerator:
    """A handle whose calls end one after the other, each in a turn of the event loop."""

    def __init__(self, running: deque[asyncio.Future[None]]) -> None:
        self._running = running
        self.respond = SimpleNamespace(remote=self._respond)

    def _respond(self, *_: object) -> asyncio.Future[None]:
        self._running.append(asyncio.get_running_loop().create_future())
        return self._running[-1]


async def end_calls(running: deque[asyncio.Future[None]], count: int) -> None:
    """End so many calls, the oldest first."""
    while count:
        if running:
            running.popleft().set_result(None)
            count -= 1
        await asyncio.sleep(0)


async def pool_microseconds(waiting: int) -> float:
    """Of one call, with so many prompts given to `respond` at once."""
    running: deque[asyncio.Future[None]] = deque()
    pool = GeneratorPool(
        cast(Any, [FakeGenerator(running) for _ in range(MEMBERS)]),
        GeneratorPoolConfig(max_in_flight=MAX_IN_FLIGHT),
        keep_in_flight=True,
        startup_timeout_s=1.0,
        log=cast(Any, None),
    )
    for member in pool._members:
        member.ready.set()
    [prompt, *_] = prompts()
    started = clock()
    ending = asyncio.create_task(end_calls(running, waiting))
    await asyncio.gather(*(pool.respond(prompt, SamplingConfig(), 0) for _ in range(waiting)))
    await ending
    return (clock() - started) / waiting * 1e6


# ---- the buffer's actor --------------------------------------------------------------------------


def config() -> Config:
    """Every slot is fresh until the shelf is full, and half of them afterwards."""
    return Config.model_validate(
        {
            "run": {"directory": "/runs/x"},
            "teacher": {"model": "/models/teacher"},
            "student": {"model": "/models/student"},
            "data": {"train": ["/data/train.jsonl"]},
            "learner": {
                "steps": 100_000,
                "batch_size": SLOTS,
                "workers": RANKS,
                "max_micro_batch_tokens": 8192,
            },
            "rollout": {"lookahead": 2},
            "replay": {"capacity": HELD, "min_size": HELD},
            "schedule": {"type": "fixed", "phi": 1.0},
            "validation": {"interval": 100_000},
        }
    )


async def timed(action: Callable[[], Awaitable[object]]) -> float:
    """Milliseconds until it has returned and everything that it woke has looked."""
    started = clock()
    await action()
    for _ in range(SETTLE):
        await asyncio.sleep(0)
    return (clock() - started) * 1e3


class Steps:
    """Takes steps of a buffer's actor as orchestrator and learners do."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor
        self.step = 0
        self.queue: list[Demand] = []
        self.ids = np.arange(PROMPT_TOKENS, dtype=np.int32)

    async def demand(self) -> Work:
        """What the buffer wants done."""
        work = await self.actor.work(60.0)
        self.queue += work.demand
        return work

    async def next(self) -> tuple[list[float], float, list[RankPlan]]:
        """Milliseconds of each add with all ranks waiting, and of the draw after the last one."""
        calls = [
            asyncio.create_task(self.actor.draw(self.step, rank, 1e6)) for rank in range(RANKS)
        ]
        await asyncio.sleep(0)
        todo, self.queue = self.queue[:SLOTS], self.queue[SLOTS:]
        arrived = [response(demand, self.ids) for demand in todo]
        adds = [await timed(lambda one=one: self.actor.add(1, one)) for one in arrived[:-1]]
        started = clock()
        await self.actor.add(1, arrived[-1])
        shares = [share for share in await asyncio.gather(*calls) if share is not None]
        draw = (clock() - started) * 1e3
        assert len(shares) == RANKS
        self.step += 1
        await self.actor.advance(self.step)
        return adds, draw, shares


async def buffer_numbers() -> dict[str, float]:
    """Adds and draws with an empty shelf, and with a full one."""
    context = SimpleNamespace(was_current_actor_reconstructed=False)
    with mock.patch.object(ray, "get_runtime_context", lambda: context):
        actor: Actor = BufferActor(config())
    data = prompts()
    await actor.restore(1, None, TrainingData(prompts=data, demonstrations=[]))
    await actor.report(Validation(step=0, loss=1.0, tokens=1))
    steps = Steps(actor)
    work = await steps.demand()
    numbers: dict[str, float] = {}
    adds, _, shares = await steps.next()
    numbers["1,024 adds for 64 waiting ranks, s"] = sum(adds) / 1e3
    numbers["one add at the median, ms"] = statistics.median(adds)
    draws, late = [], []
    while actor._buffer.counters.replay + SLOTS <= HELD:
        await steps.demand()
        late, draw, shares = await steps.next()
        draws.append(draw)
    numbers["one add with 100,000 sequences held, ms"] = statistics.median(late)
    numbers["draw of 1,024 sequences for 64 ranks, ms"] = statistics.median(draws[-9:])
    numbers["its slowest of the last nine, ms"] = max(draws[-9:])
    started = clock()
    replies = [pickle.dumps(share, protocol=5) for share in shares]
    numbers["64 replies pickled, ms"] = (clock() - started) * 1e3
    numbers["64 replies, kB"] = sum(map(len, replies)) / 1e3
    ids = [pickle.dumps(share.facts, protocol=5) for share in shares]
    numbers["of them the facts, kB"] = sum(map(len, ids)) / 1e3
    started = clock()
    message = pickle.dumps(work, protocol=5)
    numbers["a step's demand pickled, ms"] = (clock() - started) * 1e3
    numbers["one demand, bytes"] = len(pickle.dumps(work.demand[0], protocol=5))
    assert len(work.demand) == 2 * SLOTS
    assert message
    facts = next(share.facts for share in shares if share.facts is not None)
    record = StepRecord.build(
        TrainStep(step=1, loss=1.0), facts, buffer=BufferSizes(), work=Counters()
    )
    return numbers | log_numbers(to_json(record))


def log_numbers(line: str) -> dict[str, float]:
    """The size of a step's line, and what reading one costs at the end."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        path.write_text((line + "\n") * LINES)
        started = clock()
        assert len(read_records(path)) == LINES
        seconds = clock() - started
    assert json.loads(line)
    return {"a step's line in the log, kB": len(line) / 1e3, "read, ms": seconds / LINES * 1e3}


# ---- the table -----------------------------------------------------------------------------------


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--waiting", default="1000,8000,100000")
    arguments = parser.parse_args()
    commit()  # the one that is imported, whatever changes while this runs
    numbers = {
        f"one call with {waiting:,} prompts waiting, µs": asyncio.run(pool_microseconds(waiting))
        for waiting in map(int, arguments.waiting.split(","))
    }
    numbers |= asyncio.run(buffer_numbers())
    table = Table("what", "value")
    for name, value in numbers.items():
        table.add_row(name, f"{value:,.3f}")
    Console().print(table)
    print(f"written: {write('coordination', {'numbers': numbers})}")


if __name__ == "__main__":
    main()
