"""Generators and scorers that fail on demand. Every actor imports this module: keep it light."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import numpy as np
import ray

from distillm_ray.cluster.member import PooledActor
from distillm_ray.config import SamplingConfig
from distillm_ray.errors import ModelError
from distillm_ray.rollout.generator import SlowRequest
from distillm_ray.types import (
    Demand,
    HiddenTargets,
    Prompt,
    Rollout,
    ScoreReport,
    Weights,
)
from tests import make

HIDDEN_SIZE = 50_000  # 200 kB a token: more than Ray sends inline with a reply


def demand(text: str = "") -> Demand:
    """A demand whose prompt's id tells a fake actor what to do."""
    return make.demand(of=make.prompt(text))


def rollout(name: str, num_tokens: int = 1, *, text: str = "", version: int = 0) -> Rollout:
    """A student's response with the token ids 0, 1, 2 and so on."""
    return make.rollout(name, response=range(num_tokens), text=text, version=version)


class Trouble(PooledActor):
    """Fails as the text of its input says. The text of its responses is its process id."""

    hung_since = 0.0

    async def silent_s(self) -> float:
        return time.monotonic() - self.hung_since if self.hung_since else 0.0

    async def obey(self, text: str) -> None:
        action, _, only_once = text.partition(" once ")  # the file marks that it did
        if only_once and os.path.exists(only_once):
            return
        if only_once:
            Path(only_once).touch()
        match action.partition(" ")[0]:  # what follows tells one input from another
            case "die":
                os._exit(1)
            case "raise":
                raise RuntimeError("out of memory")
            case "abort":
                raise SlowRequest("too long")
            case "hang":
                self.hung_since = time.monotonic()
                await asyncio.sleep(1000)
            case "refuse":
                raise ModelError("teacher.model: no good")


class FakeGenerator(Trouble):
    """Holds a weights version. Its start and each weight update take `seconds`."""

    def __init__(self, seconds: float = 0.0, at_start: str = "") -> None:
        self.seconds = seconds
        self.at_start = at_start
        self.version = 0
        self.taking = False

    async def start(self) -> None:
        await asyncio.sleep(self.seconds)
        await self.obey(self.at_start)

    async def generate(self, demand: Demand) -> Rollout:
        await self.obey(demand.prompt_id)
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


class DemandedGenerator(FakeGenerator):
    """Responds to a demand as a real one does; its prompt's id tells it what to do."""

    async def generate(self, demand: Demand) -> Rollout:
        await asyncio.sleep(0.02)
        await self.obey(demand.prompt_id)
        await asyncio.sleep(0.02)
        return make.rollout(
            f"student-{demand.ordinal}",
            prompt_id=demand.prompt_id,
            ordinal=demand.ordinal,
            version=self.version,
            text=str(os.getpid()),
        )


class HeldGenerator(DemandedGenerator):
    """Finishes no response before a file exists, so that a learner waits for it."""

    def __init__(self, opened_by: Path) -> None:
        super().__init__()
        self.opened_by = opened_by

    async def generate(self, demand: Demand) -> Rollout:
        while not self.opened_by.exists():
            await asyncio.sleep(0.05)
        return await super().generate(demand)


class FakeScorer(Trouble):
    """Returns targets filled with the number of tokens of the sequence, and counts its calls."""

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
    """A learner that publishes weights and does nothing else."""

    def publish(self, version: int) -> Weights:
        return make.weights(version, ray.put(np.zeros(100_000)), nbytes=800_000)
