"""Prompt to Rollout: what every generator is, whatever engine runs inside.

    Demand ──► wait for its weights ──► engine ──► count ──► Rollout
                      ▲
    Weights ──► between engine steps (in-flight requests continue), or after the last one finished

A subclass brings the engine: `start`, `stop`, `_respond`, `_load`. This file decides what is
counted and which seed a request has, weight_gate when weights may change. It knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from distillm_ray.config import RolloutConfig, SamplingConfig
from distillm_ray.rollout.responses import is_empty, is_looping
from distillm_ray.rollout.weight_gate import WeightGate
from distillm_ray.types import (
    Demand,
    FinishReason,
    Float32Array,
    Int32Array,
    Prompt,
    Rollout,
    Source,
    Weights,
)

Device: TypeAlias = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """What an engine is asked: one prompt, fully specified."""

    request_id: str
    prompt_ids: Int32Array
    sampling: SamplingConfig
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int
    version: int  # of the weights at submission


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Response:
    """What an engine answers. The end token, if one was generated, is the last of `token_ids`."""

    token_ids: Int32Array  # [T], T >= 1
    logprobs: Float32Array  # [T], of the engine's weights at temperature 1, before any filter
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorCounters:
    """Since the generator was made. What a filter drops is counted too."""

    responses: int = 0
    tokens: int = 0  # of responses
    prompt_tokens: int = 0
    empty: int = 0  # nothing but an end token
    truncated: int = 0  # ended by length
    looping: int = 0  # see is_looping
    in_flight: int = 0  # now
    busy_seconds: float = 0.0  # with at least one request in the engine
    updates: int = 0
    update_seconds: float = 0.0  # until the weights were in place, draining included


class Generator(ABC):
    """Answers prompts with the newest weights that it was given."""

    def __init__(
        self,
        model_dir: Path,
        config: RolloutConfig,
        *,
        end_token_ids: Sequence[int],
        max_prompt_tokens: int,
        max_response_tokens: int,
        seed: int,
        device: Device,
        vocabulary_size: int,
        version: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        """Nothing heavy happens before `start`.

        `end_token_ids`: the model's own, all of them; `config.sampling.stop_token_ids` come on
        top. `vocabulary_size`: the tokenizer's; rows of the head from there on are padding, and no
        response holds their ids. `version`: of the weights in `model_dir`.
        """
        if not end_token_ids and not config.sampling.stop_token_ids:
            raise ValueError(
                f"{model_dir} names no end token and rollout.sampling.stop_token_ids is empty:"
                " every response would run to its length limit; set rollout.sampling.stop_token_ids"
            )
        self.model_dir = model_dir
        self.config = config
        self.end_token_ids = tuple(end_token_ids)
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.seed = seed
        self.device: Device = device
        self.vocabulary_size = vocabulary_size
        self.trust_remote_code = trust_remote_code
        self._gate = WeightGate(version, config.timeout_s)
        self._counters = GeneratorCounters()

    # ---- the engine, by subclass ---------------------------------------------------------------

    @abstractmethod
    async def start(self) -> None:
        """Load the model and be ready to answer."""

    @abstractmethod
    async def stop(self) -> None:
        """Free the engine. In-flight requests fail."""

    @abstractmethod
    async def _respond(self, request: Request) -> Response:
        """Answer one request; many run at once. Raises if the engine fails: never a part of it."""

    @abstractmethod
    async def _load(self, buckets: Sequence[Any]) -> None:
        """Replace all weights; no request is between two engine steps while it runs."""

    # ---- what others call ----------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Prompt and response tokens together."""
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def version(self) -> int:
        """Of the weights in use: completed optimizer steps."""
        return self._gate.version

    @property
    def counters(self) -> GeneratorCounters:
        """A snapshot."""
        gate = self._gate
        return replace(self._counters, in_flight=gate.in_flight, busy_seconds=gate.busy_seconds)

    async def generate(self, demand: Demand) -> Rollout:
        """Answer a demand as the config says, with weights of `demand.min_version` or newer.

        Waits for those weights and then for the response, each at most `rollout.timeout_s`;
        raises TimeoutError saying which. The seed is a function of run seed, ordinal and attempt.
        """
        return await self._run(
            demand.prompt,
            rollout_id=f"student-{demand.ordinal}",
            sampling=self.config.sampling,
            seed=request_seed(self.seed, demand.ordinal, demand.attempt),
            source=Source.STUDENT,
            min_version=demand.min_version,
            ordinal=demand.ordinal,
        )

    async def complete(
        self,
        prompt: Prompt,
        sampling: SamplingConfig,
        *,
        seed: int,
        source: Source = Source.STUDENT,
    ) -> Rollout:
        """Answer a prompt outside of training: evaluation, probes, `distillm-ray generate`.

        The engine's seed is a function of `seed` and the prompt's id, so that equal seeds give the
        same sampling noise whatever the order. Raises ValueError where the lengths do not fit.
        """
        return await self._run(
            prompt,
            rollout_id=f"{source}-{prompt.prompt_id}-{seed}",
            sampling=sampling,
            seed=request_seed(seed, zlib.crc32(prompt.prompt_id.encode()), 0),
            source=source,
            min_version=0,
            ordinal=None,
        )

    async def update_weights(self, weights: Weights, *, keep_in_flight: bool) -> float:
        """Take these weights; returns the seconds until they were in place.

        `weights.buckets` are the dictionaries themselves (resolve references first). With
        `keep_in_flight` running requests continue with the new weights; without, they finish with
        the old ones first. New requests wait either way. A version not above ours is ignored.
        Raises TimeoutError after `rollout.timeout_s`. After any failure the engine's weights are
        unknown: every later call raises RuntimeError, and the generator must be replaced.
        """
        seconds = await self._gate.update(
            weights.version, lambda: self._load(weights.buckets), keep_in_flight=keep_in_flight
        )
        if seconds is None:
            return 0.0
        self._counters = replace(
            self._counters,
            updates=self._counters.updates + 1,
            update_seconds=self._counters.update_seconds + seconds,
        )
        return seconds

    # ---- how ----------------------------------------------------------------------------------

    async def _run(
        self,
        prompt: Prompt,
        *,
        rollout_id: str,
        sampling: SamplingConfig,
        seed: int,
        source: Source,
        min_version: int,
        ordinal: int | None,
    ) -> Rollout:
        max_tokens = self._max_tokens(prompt, sampling)
        async with self._gate.request(rollout_id, min_version) as version:
            request = Request(
                request_id=rollout_id,
                prompt_ids=prompt.token_ids,
                sampling=sampling,
                max_tokens=max_tokens,
                stop_token_ids=tuple(
                    dict.fromkeys((*self.end_token_ids, *sampling.stop_token_ids))
                ),
                seed=seed,
                version=version,
            )
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    response = await self._respond(request)
            except TimeoutError as error:
                raise TimeoutError(
                    f"{rollout_id} had no response after rollout.timeout_s ="
                    f" {self.config.timeout_s:g} s"
                ) from error
        rollout = Rollout(
            rollout_id=rollout_id,
            prompt_id=prompt.prompt_id,
            prompt_ids=prompt.token_ids,
            response_ids=response.token_ids,
            loss_mask=np.ones(len(response.token_ids), dtype=np.bool_),
            source=source,
            version=version,
            finish_reason=response.finish_reason,
            logprobs=response.logprobs,
            ordinal=ordinal,
        )
        self._count(rollout)
        return rollout

    def _max_tokens(self, prompt: Prompt, sampling: SamplingConfig) -> int:
        """What the request may generate. Raises ValueError if the engine has no room for it."""
        max_tokens = sampling.max_tokens or self.max_response_tokens
        if len(prompt.token_ids) + max_tokens > self.max_model_len:
            raise ValueError(
                f"prompt {prompt.prompt_id}: its tokens and sampling.max_tokens must fit into"
                " data.max_prompt_tokens + the longest response, got"
                f" {len(prompt.token_ids)} + {max_tokens} > {self.max_model_len}"
            )
        return max_tokens

    def _count(self, rollout: Rollout) -> None:
        old = self._counters
        self._counters = replace(
            old,
            responses=old.responses + 1,
            tokens=old.tokens + len(rollout.response_ids),
            prompt_tokens=old.prompt_tokens + len(rollout.prompt_ids),
            empty=old.empty + is_empty(rollout),
            truncated=old.truncated + (rollout.finish_reason is FinishReason.LENGTH),
            looping=old.looping + is_looping(rollout),
        )


def request_seed(run_seed: int, ordinal: int, attempt: int) -> int:
    """The engine's seed of one request: other ordinals and attempts sample other noise."""
    words = np.random.SeedSequence((run_seed, ordinal, attempt)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))  # vLLM reads -1 as "none" and stores 64 bits, signed
