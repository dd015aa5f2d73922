"""`rollout` and `generate`: engines, sampling, and the pools of generators."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillm_ray.config.fields import (
    Above0,
    Amount,
    Dtype,
    Integer,
    MayChange,
    NonNegative,
    Number,
    Positive,
    Section,
    type_unless_given,
)
from distillm_ray.config.roles import PoolConfig


class VllmEngine(Section):
    """vLLM's AsyncLLM, on GPUs or on its CPU build."""

    type: Literal["vllm"] = "vllm"
    gpu_memory_utilization: Annotated[Number, Field(gt=0.0, le=1.0)] = 0.85
    cpu_kv_cache_gib: Positive = 1
    max_num_seqs: Positive = 64
    enforce_eager: bool = False  # always on without a GPU


class TransformersEngine(Section):
    """transformers' generate(), for machines where vLLM has no build."""

    type: Literal["transformers"] = "transformers"
    max_batch_size: Positive = 16


class SamplingConfig(Section):
    """How responses are sampled."""

    temperature: Amount = 1.0
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegative = 0  # 0: all tokens
    max_tokens: Positive | None = None  # default: data.max_response_tokens
    stop_token_ids: tuple[Integer, ...] = ()  # besides the model's own end tokens

    @property
    def limit(self) -> int:
        """Most tokens of a response. `Config` fills in the default."""
        assert self.max_tokens is not None, "sampling that does not come from a complete Config"
        return self.max_tokens


class FilterConfig(Section):
    """Which generated responses are not trained on. Both kinds are counted in any case."""

    drop_looping: bool = False  # repeats an n-gram to the end
    drop_truncated: bool = False  # ended by length


SECONDS_PER_TOKEN = 0.5  # of one response, in a full batch, on a slow machine
SHORTEST_LIMIT_S = 600.0


class GeneratorPoolConfig(PoolConfig):
    """A pool of generators."""

    engine: MayChange[
        Annotated[
            VllmEngine | TransformersEngine, Field(discriminator="type"), type_unless_given("vllm")
        ]
    ] = VllmEngine()
    dtype: MayChange[Dtype] = "auto"
    max_in_flight: MayChange[Positive] = 256  # requests per generator
    # One response, from the start of its decoding; then it is generated again. Default: what its
    # tokens take at 2 tokens a second, and at least ten minutes.
    timeout_s: MayChange[Above0 | None] = None
    # Without any token of any request, or for one weight update; then the generator is replaced.
    stall_timeout_s: MayChange[Above0] = 600.0

    @property
    def batch_size(self) -> int:
        """Requests that one engine decodes at the same time; others wait in its queue."""
        if isinstance(self.engine, VllmEngine):
            return self.engine.max_num_seqs
        return self.engine.max_batch_size

    def response_limit_s(self, max_tokens: int) -> float:
        """The limit on decoding one response of at most so many tokens."""
        return self.timeout_s or max(SHORTEST_LIMIT_S, SECONDS_PER_TOKEN * max_tokens)

    def limit_s(self, num_requests: int, max_tokens: int) -> float:
        """The limit on so many responses: of each wave, and of one more for those repeated.

        One generator may stall meanwhile.
        """
        waves = -(-num_requests // (self.batch_size * self.fewest)) + 1
        return waves * self.response_limit_s(max_tokens) + self.stall_timeout_s

    @model_validator(mode="after")
    def _engine_runs_in_parallel(self) -> GeneratorPoolConfig:
        if isinstance(self.engine, TransformersEngine) and self.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel must be 1 with engine.type=transformers, got"
                f" {self.tensor_parallel}: that engine runs on one device; raise actors, or use"
                " engine.type=vllm"
            )
        return self


class RolloutConfig(GeneratorPoolConfig):
    """The student's generators during training, and how far they run ahead of the learner."""

    sampling: SamplingConfig = SamplingConfig()
    # m: what is trained on is sampled from m x teacher + (1 - m) x student; probes and evaluations
    # are the student's alone.
    teacher_mix: Annotated[Number, Field(ge=0.0, lt=1.0)] = 0.0
    filter: FilterConfig = FilterConfig()
    # Each publication of weights asks for the fresh samples of `sync_interval` steps, `lookahead`
    # - 1 steps before the first of them is trained on.
    lookahead: Positive = 2
    sync_interval: Positive = 1
    max_staleness: NonNegative = 4  # in optimizer steps
    logprob_warning: MayChange[Above0] = 0.1  # mean |engine - learner|, in nats

    @property
    def open_steps(self) -> int:
        """Steps whose fresh samples may be in flight or finished at the same time."""
        return self.lookahead + self.sync_interval - 1

    @model_validator(mode="after")
    def _age_is_bounded(self) -> RolloutConfig:
        worst = self.lookahead + self.sync_interval - 2
        if worst > self.max_staleness:
            raise ValueError(
                f"rollout.lookahead + rollout.sync_interval - 2 must be at most"
                f" rollout.max_staleness, got {self.lookahead} + {self.sync_interval} - 2 ="
                f" {worst} > {self.max_staleness}: a sample would be older than you allow;"
                " lower lookahead or sync_interval, or raise max_staleness"
            )
        return self

    @model_validator(mode="after")
    def _mixture_is_sampled_as_it_is(self) -> RolloutConfig:
        if self.teacher_mix == 0.0:
            return self
        if isinstance(self.engine, VllmEngine):
            raise ValueError(
                f"rollout.teacher_mix must be 0 with rollout.engine.type=vllm, got"
                f" {self.teacher_mix:g}: both models must take every token together, and vLLM's"
                " engine runs one model; use rollout.engine.type=transformers"
            )
        for key, value, needed in (
            ("temperature", self.sampling.temperature, 1.0),
            ("top_p", self.sampling.top_p, 1.0),
            ("top_k", self.sampling.top_k, 0),
        ):
            if value != needed:
                raise ValueError(
                    f"rollout.sampling.{key} must be {needed:g} with rollout.teacher_mix ="
                    f" {self.teacher_mix:g}, got {value:g}: tokens are sampled from the mixture of"
                    " both whole distributions, whose probabilities importance weights divide by;"
                    " remove the key, or set rollout.teacher_mix=0"
                )
        return self


class GenerateConfig(GeneratorPoolConfig):
    """The pool of `distillm-ray generate`, and how it samples."""

    sampling: SamplingConfig = SamplingConfig()
