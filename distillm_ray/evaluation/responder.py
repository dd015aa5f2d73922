"""Responses of a model to held-out prompts, by a pool of generators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.actor import ActorProxy

from distillm_ray.cluster.actors import ask, release
from distillm_ray.cluster.orchestrator import OrchestratorActor, start_orchestrator
from distillm_ray.cluster.placement import RoleSpec
from distillm_ray.cluster.rollout import start_generators
from distillm_ray.config import (
    Config,
    GeneratorPoolConfig,
    ModelConfig,
    SamplingConfig,
)
from distillm_ray.data.decoding import decode
from distillm_ray.models.directory import ModelFacts
from distillm_ray.rollout.generator import generator_job
from distillm_ray.types import Device, Prompt, Rollout, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Responder:
    """Generators that are running, behind their orchestrator."""

    orchestrator: ActorProxy[OrchestratorActor]
    pool: GeneratorPoolConfig
    startup_timeout_s: float
    tokenizer: PreTrainedTokenizerBase
    interrupt: Callable[[], None]  # called while waiting; what it raises ends the wait

    def respond(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
    ) -> list[Rollout]:
        """One response for each prompt, in order, with its text.

        The limit follows from the waves of requests; a generator may be replaced meanwhile.
        """
        limit_s = self.pool.limit_s(len(prompts), sampling.limit) + self.startup_timeout_s
        rollouts = ask(
            self.orchestrator.respond.remote(prompts, sampling, seed),
            f"responses to {len(prompts)} prompts (timeout_s of the pool)",
            timeout_s=limit_s,
            interrupt=self.interrupt,
        )
        return [
            dataclasses.replace(rollout, text=decode(self.tokenizer, rollout))
            for rollout in rollouts
        ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedModel:
    """A model directory, how it is loaded, and the pool that runs it."""

    facts: ModelFacts
    model: ModelConfig
    source: Source
    spec: RoleSpec
    pool: GeneratorPoolConfig


@contextmanager
def serving(
    config: Config,
    served: ServedModel,
    sampling: SamplingConfig,
    *,
    device: Device,
    tokenizer: PreTrainedTokenizerBase,
    end_token_id: int,
    interrupt: Callable[[], None],
) -> Iterator[Responder]:
    """Start the pool of a model, and end it after the block."""
    job = generator_job(
        config,
        served.facts,
        served.source,
        sampling,
        end_token_id=end_token_id,
        max_response_tokens=sampling.limit,
        trust_remote_code=served.model.trust_remote_code,
        device=device,
    )
    generators = start_generators(served.spec, served.pool, job)
    orchestrator = start_orchestrator(config, served.pool, generators)
    try:
        ask(
            orchestrator.start.remote(),
            "generators that start (twice run.startup_timeout_s)",
            timeout_s=2 * config.run.startup_timeout_s,
            interrupt=interrupt,
        )
        yield Responder(
            orchestrator=orchestrator,
            pool=served.pool,
            startup_timeout_s=config.run.startup_timeout_s,
            tokenizer=tokenizer,
            interrupt=interrupt,
        )
    finally:
        release([orchestrator, *generators])
