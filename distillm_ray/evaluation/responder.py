"""Responses of a model to held-out prompts, by a pool of generators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorProxy

from distillm_ray.cluster.actors import ask, release
from distillm_ray.cluster.orchestrator import OrchestratorActor, start_orchestrator
from distillm_ray.cluster.placement import RoleSpec
from distillm_ray.cluster.rollout import GeneratorStarter
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

WAVES_IN_FLIGHT = 2  # one that the engines work on, one that is ready when a place is free


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
        rollouts = self._ask(
            self.orchestrator.respond.remote(prompts, sampling, seed), len(prompts), sampling
        )
        return [
            dataclasses.replace(rollout, text=decode(self.tokenizer, rollout))
            for rollout in rollouts
        ]

    def stream(
        self, prompts: Iterable[Prompt], sampling: SamplingConfig, seed: int
    ) -> Iterator[list[Rollout]]:
        """Responses as they end, some at a time, without their text.

        `WAVES_IN_FLIGHT` waves of prompts are under way, also while the caller is busy with those
        that it was given; no more prompts and responses than that are held here or behind.
        """
        rest = iter(prompts)
        in_flight = 0

        def next_call() -> ray.ObjectRef[list[Rollout]] | None:
            nonlocal in_flight
            new = list(islice(rest, WAVES_IN_FLIGHT * self._at_once - in_flight))
            in_flight += len(new)
            return self.orchestrator.exchange.remote(new, sampling, seed) if in_flight else None

        call = next_call()
        while call is not None:
            ended = self._ask(call, in_flight, sampling)
            in_flight -= len(ended)
            call = next_call()
            yield ended

    @property
    def _at_once(self) -> int:
        """How many prompts the pool responds to at a time."""
        return self.pool.batch_size * self.pool.most

    def _ask(
        self, call: ray.ObjectRef[list[Rollout]], num_prompts: int, sampling: SamplingConfig
    ) -> list[Rollout]:
        return ask(
            call,
            f"responses to {num_prompts} prompts (timeout_s of the pool)",
            timeout_s=self.pool.limit_s(num_prompts, sampling.limit) + self.startup_timeout_s,
            interrupt=self.interrupt,
        )


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
    generators = GeneratorStarter(spec=served.spec, config=served.pool, job=job).start()
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
