"""From Prompt to Rollout: the part of a generator that does not depend on its engine.

    Demand  ──► wait for min_version ──► engine ──► Rollout
                        ▲
    Weights ──► load between two engine steps, or after the last request in flight

A subclass implements the engine: `start`, `stop`, `_respond` and `_load`, and `_sleep` and `_wake`
where the job says that it shares its device. This module derives each
request's seed and checks its length; weight_gate.py decides when weights may change. No Ray here.
"""

from __future__ import annotations

import asyncio
import zlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distillm_ray.activity import Activity
from distillm_ray.config import (
    Config,
    Dtype,
    GeneratorPoolConfig,
    RemotePath,
    SamplingConfig,
)
from distillm_ray.models.directory import ModelFacts
from distillm_ray.remote.inputs import fetched
from distillm_ray.rollout.weight_gate import WeightGate
from distillm_ray.types import (
    Bucket,
    Demand,
    Device,
    FinishReason,
    Float32Array,
    Int32Array,
    Prompt,
    Rollout,
    Source,
    Weights,
)


class SlowRequest(Exception):
    """A request was aborted at its limit. Its engine works on."""


def _no_sign() -> None:
    """For requests that nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One prompt for an engine, fully specified."""

    request_id: str
    prompt_ids: Int32Array
    sampling: SamplingConfig
    teacher_mix: float  # the teacher's share of every token's distribution
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int
    version: int  # of the weights at submission
    sign: Callable[[], None] = _no_sign  # to be called when its decoding starts, and while it lasts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Response:
    """What an engine generates. A generated end token is the last of `token_ids`."""

    token_ids: Int32Array  # [T], T >= 1
    # [T], at temperature 1 and unfiltered, under the engine's weights or their mixture with the
    # teacher's distribution.
    logprobs: Float32Array
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedTeacher:
    """A teacher that takes part in every token of a demanded response."""

    model: Path | RemotePath
    share: float  # m of b = m p + (1 - m) q, p the teacher's and q the student's distribution
    dtype: Dtype
    trust_remote_code: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorJob:
    """What a generator is told about its model."""

    model: Path | RemotePath
    source: Source  # of the responses outside of the demand
    sampling: SamplingConfig  # of the demand
    end_token_ids: tuple[int, ...]  # of the model; those of the sampling are added to them
    vocabulary_size: int  # of the tokenizer; later rows of the head pad it and are never sampled
    max_prompt_tokens: int
    max_response_tokens: int
    seed: int
    device: Device
    trust_remote_code: bool = False
    teacher: MixedTeacher | None = None  # None: the demand is the model's alone
    sleeps: bool = False  # the device is a learner's while the engine sleeps


def generator_job(
    config: Config,
    facts: ModelFacts,
    source: Source,
    sampling: SamplingConfig,
    *,
    end_token_id: int,
    max_response_tokens: int,
    trust_remote_code: bool,
    device: Device,
) -> GeneratorJob:
    """The job of generators that run the model of `facts`.

    Args:
        end_token_id: ends the responses of the data, so it ends generated ones too.
    """
    return GeneratorJob(
        model=facts.source,
        source=source,
        sampling=sampling,
        end_token_ids=facts.ends(end_token_id),
        vocabulary_size=facts.vocabulary_size,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        seed=config.run.seed,
        device=device,
        trust_remote_code=trust_remote_code,
    )


def student_job(
    config: Config, facts: ModelFacts, *, end_token_id: int, device: Device
) -> GeneratorJob:
    """The job of the student's generators in a training run."""
    job = generator_job(
        config,
        facts,
        Source.STUDENT,
        config.rollout.sampling,
        end_token_id=end_token_id,
        max_response_tokens=config.longest_response,
        trust_remote_code=config.student.trust_remote_code,
        device=device,
    )
    job = replace(job, sleeps=config.is_colocated)
    if not config.mixes_teacher:
        return job
    assert config.teacher is not None
    teacher = MixedTeacher(
        model=config.teacher.model,
        share=config.rollout.teacher_mix,
        dtype=config.teacher.dtype,
        trust_remote_code=config.teacher.trust_remote_code,
    )
    return replace(job, teacher=teacher)


class Generator(ABC):
    """Generates responses with the newest weights that it was given."""

    remark = ""  # what a user should know about how the model runs, set by `start`

    def __init__(self, config: GeneratorPoolConfig, job: GeneratorJob) -> None:
        """Store the settings; `start` loads the model.

        Raises:
            ValueError: there is no end token at all.
        """
        if not job.end_token_ids and not job.sampling.stop_token_ids:
            raise ValueError(
                f"{job.model} names no end token and sampling.stop_token_ids is empty: every"
                " response would run to its length limit; set sampling.stop_token_ids"
            )
        self.config = config
        self.job = job
        self._gate = WeightGate(config.stall_timeout_s)
        self._activity = Activity()
        self._loading = False

    # ---- implemented by the engines ------------------------------------------------------------

    @abstractmethod
    async def start(self) -> None:
        """Load the model; requests are accepted when this returns."""

    @abstractmethod
    async def stop(self) -> None:
        """Free the engine. Requests in flight fail."""

    @abstractmethod
    async def _respond(self, request: Request) -> Response:
        """Generate one response; many calls run concurrently.

        Calls `request.sign` in the event loop with its first token and at later ones. Cancelling
        it takes the request out of the engine. Raises if the engine fails; never returns a partial
        response.
        """

    @abstractmethod
    async def _load(self, buckets: Iterable[Bucket]) -> None:
        """Replace all weights. The engine takes no step meanwhile.

        To iterate may take seconds: not in the event loop.
        """

    async def _sleep(self) -> None:
        """Free the device's memory, weights included. No request is in flight."""
        raise RuntimeError(f"{type(self).__name__} does not sleep: the config refuses it")

    async def _wake(self) -> None:
        """Take the memory back, with the weights from before `_sleep`."""
        raise RuntimeError(f"{type(self).__name__} does not sleep: the config refuses it")

    # ---- called by others ----------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Prompt and response tokens together."""
        return self.job.max_prompt_tokens + self.job.max_response_tokens

    @property
    def version(self) -> int:
        """The optimizer step of the weights in use."""
        return self._gate.version

    @property
    def silent_s(self) -> float:
        """Seconds since the engine made a token or ended a request; 0 if it has none.

        It makes no tokens while it loads weights, which has a limit of its own.
        """
        return 0.0 if self._loading else self._activity.silent_s

    async def generate(self, demand: Demand) -> Rollout:
        """Generate a demanded rollout with weights of `demand.min_version` or newer.

        Waits for those weights, then for its turn in the engine, then for the response. The seed is
        a function of the run's seed, the ordinal and the attempt. Where the job names a teacher,
        every token is sampled from the mixture with it, and the log-probabilities are the
        mixture's.

        Raises:
            TimeoutError: the weights did not come within `rollout.stall_timeout_s`.
            SlowRequest: decoding took longer than `rollout.timeout_s`.
        """
        return await self._run(
            prompt_id=demand.prompt_id,
            prompt_ids=demand.prompt_ids,
            rollout_id=f"student-{demand.ordinal}",
            sampling=self.job.sampling,
            teacher_mix=0.0 if self.job.teacher is None else self.job.teacher.share,
            seed=request_seed(self.job.seed, demand.ordinal, demand.attempt),
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
        """Respond to a prompt outside of training: evaluation, probes, `distillm-ray generate`.

        The response is the model's alone, also where the demand's are mixed with a teacher.
        The engine's seed is a function of `seed` and the prompt's id, so equal seeds give the same
        sampling noise in any order of prompts.

        Raises:
            ValueError: prompt and `sampling.max_tokens` exceed `max_model_len`.
            SlowRequest: as in `generate`.
        """
        return await self._run(
            prompt_id=prompt.prompt_id,
            prompt_ids=prompt.token_ids,
            rollout_id=f"{source}-{prompt.prompt_id}-{seed}",
            sampling=sampling,
            teacher_mix=0.0,
            seed=request_seed(seed, zlib.crc32(prompt.prompt_id.encode()), 0),
            source=source,
            min_version=0,
            ordinal=None,
        )

    async def update_weights(self, weights: Weights[Bucket], *, keep_in_flight: bool) -> float:
        """Load published weights; returns the seconds until they are in use.

        Ignores a version that is not newer and returns 0. New requests wait for the update.

        Args:
            weights: `buckets` are the dictionaries themselves; resolve Ray references first.
            keep_in_flight: requests in flight continue with the new weights. Otherwise they finish
                with the old ones first.

        Raises:
            TimeoutError: loading took longer than `rollout.stall_timeout_s`.
            RuntimeError: an earlier update failed. The engine's weights are unknown from then on,
                every call raises this, and the generator must be replaced.
        """
        return await self._gate.update(
            weights.version, lambda: self._take(weights), keep_in_flight=keep_in_flight
        )

    async def sleep(self) -> None:
        """Finish the requests in flight and leave the device to others until `wake`.

        Requests and weight updates that come meanwhile wait.

        Raises:
            TimeoutError: the engine did not free its memory within `rollout.stall_timeout_s`.
        """
        await self._gate.close()
        await self._within_stall_limit(self._sleep(), "sleep")

    async def wake(self) -> None:
        """Be ready again, with the same weights.

        Raises:
            TimeoutError: the engine did not get its memory within `rollout.stall_timeout_s`.
        """
        await self._within_stall_limit(self._wake(), "wake")
        await self._gate.open()

    # ---- internals -----------------------------------------------------------------------------

    async def _within_stall_limit(self, change: Awaitable[None], name: str) -> None:
        limit_s = self.config.stall_timeout_s
        try:
            await asyncio.wait_for(change, limit_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"the engine did not {name} within rollout.stall_timeout_s = {limit_s:g} s"
            ) from error

    async def _take(self, weights: Weights[Bucket]) -> None:
        self._loading = True
        buckets: Iterable[Bucket] = weights.buckets
        if weights.adapters is not None:
            # Imported here: the orchestrator needs this file, and starts sooner without torch.
            from distillm_ray.weights.adapters import with_adapters  # noqa: PLC0415

            buckets = with_adapters(fetched(self.job.model), buckets, weights.adapters)
        try:
            await self._load(buckets)
        finally:
            self._loading = False
            self._activity.sign()

    async def _run(
        self,
        *,
        prompt_id: str,
        prompt_ids: Int32Array,
        rollout_id: str,
        sampling: SamplingConfig,
        teacher_mix: float,
        seed: int,
        source: Source,
        min_version: int,
        ordinal: int | None,
    ) -> Rollout:
        max_tokens = self._max_tokens(prompt_id, len(prompt_ids), sampling)
        async with self._gate.request(rollout_id, min_version) as version:
            request = Request(
                request_id=rollout_id,
                prompt_ids=prompt_ids,
                sampling=sampling,
                teacher_mix=teacher_mix,
                max_tokens=max_tokens,
                stop_token_ids=tuple(
                    dict.fromkeys((*self.job.end_token_ids, *sampling.stop_token_ids))
                ),
                seed=seed,
                version=version,
            )
            response = await self._within_limit(request)
        return Rollout(
            rollout_id=rollout_id,
            prompt_id=prompt_id,
            prompt_ids=prompt_ids,
            response_ids=response.token_ids,
            loss_mask=np.ones(len(response.token_ids), dtype=np.bool_),
            source=source,
            version=version,
            finish_reason=response.finish_reason,
            logprobs=response.logprobs,
            ordinal=ordinal,
        )

    async def _within_limit(self, request: Request) -> Response:
        """The response, whose decoding may take so long; the wait for its turn does not count.

        Raises:
            SlowRequest: it took longer.
        """
        limit_s = self.config.response_limit_s(request.max_tokens)
        now = asyncio.get_running_loop().time
        ended = False
        try:
            async with asyncio.timeout(None) as limit:

                def sign() -> None:
                    self._activity.sign()
                    if limit.when() is None and not ended:
                        limit.reschedule(now() + limit_s)

                try:
                    with self._activity.busy():
                        return await self._respond(replace(request, sign=sign))
                finally:
                    ended = True
        except TimeoutError as error:
            raise SlowRequest(
                f"{request.request_id} was aborted: decoding its response, of at most"
                f" {request.max_tokens} tokens, took longer than {limit_s:g} s (timeout_s of the"
                " pool, rollout.timeout_s in a run)"
            ) from error

    def _max_tokens(self, prompt_id: str, num_prompt_tokens: int, sampling: SamplingConfig) -> int:
        """The length limit of the response.

        Raises ValueError if prompt and response might exceed the engine's context.
        """
        max_tokens = sampling.max_tokens or self.job.max_response_tokens
        if num_prompt_tokens + max_tokens > self.max_model_len:
            raise ValueError(
                f"prompt {prompt_id}: its tokens and sampling.max_tokens must fit into"
                " data.max_prompt_tokens + the longest response, got"
                f" {num_prompt_tokens} + {max_tokens} > {self.max_model_len}"
            )
        return max_tokens


def request_seed(run_seed: int, ordinal: int, attempt: int) -> int:
    """The engine's seed for one request, in [0, 2^63).

    Every ordinal and every attempt gets independent sampling noise.
    """
    words = np.random.SeedSequence((run_seed, ordinal, attempt)).generate_state(1, np.uint64)
    # vLLM stores a signed 64-bit seed and reads -1 as "no seed".
    return int(words[0] >> np.uint64(1))
