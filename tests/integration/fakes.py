"""Generators and scorers that misbehave on demand. Light to import: every actor does."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import ray

from distillm_ray.cluster.pool import PooledActor
from distillm_ray.config import SamplingConfig
from distillm_ray.errors import ModelError
from distillm_ray.types import (
    Demand,
    FinishReason,
    HiddenTargets,
    Prompt,
    Rollout,
    ScoreReport,
    Source,
    Weights,
)

HIDDEN_SIZE = 50_000  # 200 kB a token: beyond what Ray keeps inside its replies


def prompt(text: str = "") -> Prompt:
    return Prompt(
        prompt_id="p",
        token_ids=np.array([1, 2], dtype=np.int32),
        reference_ids=(),
        text=text,
        references=(),
    )


def demand(text: str = "") -> Demand:
    return Demand(ordinal=0, prompt=prompt(text), min_version=0)


def rollout(name: str, num_tokens: int = 1, *, text: str = "", version: int = 0) -> Rollout:
    return Rollout(
        rollout_id=name,
        prompt_id="p",
        prompt_ids=np.array([1, 2], dtype=np.int32),
        response_ids=np.arange(num_tokens, dtype=np.int32),
        loss_mask=np.ones(num_tokens, dtype=np.bool_),
        source=Source.STUDENT,
        version=version,
        finish_reason=FinishReason.STOP,
        text=text,
    )


class Trouble(PooledActor):
    """What a prompt's text can ask of an actor; the text of an answer is its process."""

    async def obey(self, text: str) -> None:
        action, _, only_once = text.partition(" once ")  # a file that remembers, across processes
        if only_once and os.path.exists(only_once):
            return
        if only_once:
            Path(only_once).touch()
        match action:
            case "die":
                os._exit(1)
            case "raise":
                raise RuntimeError("out of memory, says the engine")
            case "hang":
                await asyncio.sleep(1000)
            case "refuse":
                raise ModelError("teacher.model: no good")


class FakeGenerator(Trouble):
    """Holds a version. `seconds`: how long it takes to start and to take weights."""

    def __init__(self, seconds: float = 0.0, at_start: str = "") -> None:
        self.seconds = seconds
        self.at_start = at_start
        self.version = 0
        self.taking = False

    async def start(self) -> None:
        await asyncio.sleep(self.seconds)
        await self.obey(self.at_start)

    async def generate(self, demand: Demand) -> Rollout:
        await self.obey(demand.prompt.text)
        await asyncio.sleep(0.01)
        return rollout("student-0", text=str(os.getpid()), version=self.version)

    async def respond(self, prompt: Prompt, sampling: SamplingConfig, seed: int) -> Rollout:
        return await self.generate(demand(prompt.text))

    async def update_weights(self, weights: Weights, keep_in_flight: bool) -> float:
        for bucket in weights.buckets:
            await bucket
        self.taking = True
        await asyncio.sleep(self.seconds)
        self.taking = False
        self.version = weights.version
        return 0.25

    async def takes_weights(self) -> bool:
        return self.taking


class FakeScorer(Trouble):
    """Targets that tell the sequence's length; counts what it has scored, as the seconds."""

    def __init__(self) -> None:
        self.scored = 0

    async def start(self) -> None: ...

    @ray.method(num_returns=2)
    async def score(self, rollout: Rollout) -> tuple[ScoreReport, HiddenTargets]:
        await self.obey(rollout.text)
        await asyncio.sleep(0.05)
        self.scored += 1
        values_TD = np.full((rollout.num_loss_tokens, HIDDEN_SIZE), rollout.num_tokens, np.float32)
        targets = HiddenTargets(values_TD=values_TD)
        return ScoreReport(num_tokens=rollout.num_tokens, nbytes=targets.nbytes), targets

    async def count(self) -> int:
        return self.scored


class Publisher:
    """A learner, as far as weights go."""

    def publish(self, version: int) -> Weights:
        return Weights(version=version, buckets=(ray.put(np.zeros(100_000)),), nbytes=800_000)
