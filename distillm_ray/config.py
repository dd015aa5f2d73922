"""The config: one frozen tree that says what a run is.

Each role has a section of its own and is never given the whole tree. A choice with parameters is a
union on `type`. `config_files.py` reads YAML and `key=value` overrides into this tree. This module
defines the keys, their defaults and the combinations that are refused. It imports no torch, Ray or
vLLM, so it loads in milliseconds.

A field of type `MayChange[...]` may have another value when a run is resumed; every other field
must keep its value (`learner/resume.py` compares them).
"""

from __future__ import annotations

import math
import os
import re
from datetime import datetime
from fractions import Fraction as FractionOf
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeGuard, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    model_validator,
)

from distillm_ray.errors import ConfigError
from distillm_ray.methods import MethodName

T = TypeVar("T")

RESUMABLE = "may change on resume"
MayChange: TypeAlias = Annotated[T, RESUMABLE]


def _no_flag(value: Any) -> Any:
    """Refuse booleans, which pydantic would read as 0 and 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


LARGEST_INTEGER = 2**53
"""Up to here, NumPy, torch and JSON readers hold every integer exactly."""

Integer = Annotated[int, BeforeValidator(_no_flag), Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)]
Number = Annotated[float, BeforeValidator(_no_flag)]
Positive = Annotated[Integer, Field(ge=1)]
NonNegative = Annotated[Integer, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
Open01 = Annotated[Number, Field(gt=0.0, lt=1.0)]
Amount = Annotated[Number, Field(ge=0.0)]
Above0 = Annotated[Number, Field(gt=0.0)]
Dtype: TypeAlias = Literal["auto", "bfloat16", "float32"]
"""`auto` is bfloat16 where the processor computes it natively, else float32."""

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def expanded_path(value: Any) -> Path:
    """The path that a user wrote, with `$NAME` and a leading `~` expanded. A `Path` stays as it is.

    Raises:
        ValueError: the value is empty or no path, a variable is not set, or a user does not exist.
    """
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a path, got {value!r}: write a file or directory, in quotes")
    text = os.path.expanduser(_VARIABLE.sub(_variable, value))
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"must be UTF-8 text without null characters, got {text!r}")
    if text.startswith("~"):
        raise ValueError(
            f"must begin with the home directory of a user, got {text!r}: there is no such user;"
            " for a name that begins with ~ write ./~"
        )
    return Path(text)


def _variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise ValueError(
            f"must name variables that are set, got {match[0]} in {match.string!r}: the environment"
            f" has no {name}; set it, or write the path out"
        )
    return os.environ[name]


def _absolute(path: Path) -> Path:
    """The path from the root. It expands to itself, so a saved config reads back as it was."""
    absolute = path.absolute()
    if again := _VARIABLE.search(str(absolute)):
        raise ValueError(
            f"must not lead to a path with {again[0]} in it, got {str(absolute)!r}: a job that"
            f" reads the saved config would expand {again[0]}; use a directory of another name"
        )
    return absolute


AbsolutePath = Annotated[Path, BeforeValidator(expanded_path), AfterValidator(_absolute)]
"""Relative paths are resolved where the job starts: Ray's workers run in other directories."""


def _type_unless_given(name: str) -> BeforeValidator:
    """A choice of several sections that may leave out its `type`, as in `template: {system: x}`."""

    def add(value: Any) -> Any:
        return {"type": name, **value} if isinstance(value, dict) and "type" not in value else value

    return BeforeValidator(add)


def _moment(value: Any) -> Any:
    """ISO 8601 only: pydantic would read 20261125 as seconds since 1970."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            pass
    if isinstance(value, datetime):
        return value
    raise ValueError(f"must be a date, as in 2026-11-25 or 2026-11-25T12:00:00, got {value!r}")


class Section(BaseModel):
    """Frozen. Unknown keys, infinite numbers and NaN are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


# ---- loss --------------------------------------------------------------------------------------


Text: TypeAlias = Literal["dataset", "student", "teacher", "corpus", "all"]
"""Who wrote a response, or the plain text of the corpus; `all` stands for all responses."""


class LossTerm(Section):
    """One term of the loss: on which text it holds, and its weight in the sum of all terms."""

    on: Text = "all"
    weight: Annotated[Number, Field(gt=0.0)] = 1.0
    # The weight moves here in equal steps over the first half of the run; unset: it stays.
    final_weight: Annotated[Number, Field(gt=0.0)] | None = None
    # Largest weight q / b of a token that the student sampled from b; unset: 1 for every token.
    max_importance: Annotated[Number, Field(gt=0.0)] | None = None

    def covers(self, text: str) -> bool:
        """Whether the term holds on text of this source.

        `all` leaves the corpus out: it has to be named, so that it changes no other term.
        """
        return self.on == text or (self.on == "all" and text != "corpus")

    @property
    def formula(self) -> Self:
        """The term with its parameters only: what decides on the weights has its defaults."""
        weighting = {"on", "weight", "final_weight", "max_importance"}
        return type(self).model_validate(self.model_dump(exclude=weighting))


class ForwardKL(LossTerm):
    """KL(p || q), p the teacher, q the student."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKL(LossTerm):
    """KL(q || p)."""

    type: Literal["reverse_kl"] = "reverse_kl"


class JensenShannon(LossTerm):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""

    type: Literal["jensen_shannon"] = "jensen_shannon"
    beta: Number = 0.5

    @model_validator(mode="after")
    def _beta_is_inside(self) -> JensenShannon:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta must lie strictly between 0 and 1, got {self.beta}: at the ends the"
                " divergence is 0 everywhere; use type: forward_kl or type: reverse_kl"
            )
        return self


class Skewed(LossTerm):
    """A divergence of one side from a mixture of both, in which that side has the share alpha.

    With the curriculum each sequence has an alpha of its own, at most this one: the closer teacher
    and student are on the sequence, the smaller it is (loss/curriculum.py).
    """

    alpha: Open01 = 0.1
    curriculum: bool = False
    min_alpha: Open01 = 0.01  # of the curriculum
    anchor_steps: Positive = 10  # the curriculum compares later gaps with the mean gap of these

    @model_validator(mode="after")
    def _alphas_are_in_order(self) -> Self:
        if self.curriculum and self.min_alpha >= self.alpha:
            raise ValueError(
                f"min_alpha must be below alpha, got {self.min_alpha:g} >= {self.alpha:g}: the"
                " curriculum lowers alpha to min_alpha; lower min_alpha or raise alpha"
            )
        return self


class SkewKL(Skewed):
    """KL(p || alpha p + (1 - alpha) q)."""

    type: Literal["skew_kl"] = "skew_kl"


class SkewReverseKL(Skewed):
    """KL(q || (1 - alpha) p + alpha q)."""

    type: Literal["skew_reverse_kl"] = "skew_reverse_kl"


class TotalVariation(LossTerm):
    """Half the L1 distance."""

    type: Literal["total_variation"] = "total_variation"


class AdaptiveKL(LossTerm):
    """Forward and reverse KL, weighted by the gaps over the teacher's head (mass mu) and tail."""

    type: Literal["adaptive_kl"] = "adaptive_kl"
    mu: Open01 = 0.5


class CrossEntropy(LossTerm):
    """-log q(token), without a teacher.

    The default is data-set text. On text that the student samples itself, the expected gradient of
    the cross-entropy is zero, so there the term would only add noise.
    """

    type: Literal["cross_entropy"] = "cross_entropy"
    on: Text = "dataset"


class PolicyGradient(LossTerm):
    """Clipped policy gradient of KL(q || p) at the tokens that the student sampled.

    `horizon: token` rewards each token with its own log p - log q, as RL frameworks distil.
    `horizon: rest` rewards it with the mean of the tokens after it: MiniLLM's long part.
    """

    type: Literal["policy_gradient"] = "policy_gradient"
    on: Text = "student"
    horizon: Literal["token", "rest"] = "token"
    clip: Open01 = 0.2  # ratios of the trained to the sampling student count within 1 +- clip

    @model_validator(mode="after")
    def _on_is_student(self) -> PolicyGradient:
        if self.on != "student":
            raise ValueError(
                f"on must be student with type: policy_gradient, got {self.on}: it rewards tokens"
                " that the student sampled"
            )
        return self


SAMPLED = (CrossEntropy, PolicyGradient)
"""Terms that depend on the probability of the sampled token only."""

Divergence: TypeAlias = (
    ForwardKL | ReverseKL | JensenShannon | SkewKL | SkewReverseKL | TotalVariation | AdaptiveKL
)
Term: TypeAlias = Annotated[Divergence | CrossEntropy | PolicyGradient, Field(discriminator="type")]


def has_curriculum(term: Term) -> TypeGuard[SkewKL | SkewReverseKL]:
    """Whether each sequence has an alpha of its own in this term."""
    return isinstance(term, SkewKL | SkewReverseKL) and term.curriculum


class LossConfig(Section):
    """The terms of the loss, and how tokens are weighted in the global batch."""

    terms: tuple[Term, ...] = (SkewKL(),)
    temperature: Annotated[Number, Field(gt=0.0)] = 1.0  # of both distributions in a divergence
    normalize: Literal["source", "tokens", "sequence"] = "source"
    implementation: MayChange[Literal["fused", "plain"]] = "fused"  # plain: the slow reference
    chunk_megabytes: MayChange[Positive | None] = None  # of logits; default: 64, on GPUs 1,024

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return any(not isinstance(term, CrossEntropy) for term in self.terms)

    def compares(self, text: str) -> bool:
        """Whether any term compares text of this source with the teacher."""
        return any(term.covers(text) and not isinstance(term, CrossEntropy) for term in self.terms)

    @property
    def has_policy_gradient(self) -> bool:
        """Whether any term rewards sampled tokens."""
        return any(isinstance(term, PolicyGradient) for term in self.terms)

    @property
    def curricula(self) -> tuple[int, ...]:
        """The indices of the terms whose alpha each sequence has for itself."""
        return tuple(index for index, term in enumerate(self.terms) if has_curriculum(term))

    @model_validator(mode="after")
    def _terms_differ(self) -> LossConfig:
        if not self.terms:
            raise ValueError(
                "loss.terms must hold at least one term, got an empty list: there is nothing to"
                " learn; add one, as in loss.terms=[{type: skew_kl}]"
            )
        seen: dict[tuple[str, LossTerm], int] = {}
        for index, term in enumerate(self.terms):
            if term.max_importance is not None and term.on != "student":
                raise ValueError(
                    f"loss.terms.{index}.max_importance needs on: student, got {term.on}: only"
                    " text that the student sampled has probabilities of its sampling"
                )
            first = seen.setdefault((term.on, term.formula), index)
            if first != index:
                raise ValueError(
                    f"loss.terms must differ in type, parameters or on, got {term.type} on"
                    f" {term.on} as terms {first} and {index}: they are one term with the sum of"
                    " their weights; keep one and set its weight"
                )
        return self


# ---- models, and the processes that run them ---------------------------------------------------


class ModelConfig(Section):
    """A Hugging Face directory with safetensors, and how it is loaded."""

    model: AbsolutePath
    dtype: Dtype = "auto"
    trust_remote_code: bool = False


class ProcessConfig(Section):
    """What one process of a role asks of its node."""

    num_cpus: MayChange[Annotated[Amount, Field(le=LARGEST_INTEGER)]] = 1.0
    num_gpus: MayChange[Amount | None] = None  # None: as many as the role needs, 0 without GPUs
    num_threads: MayChange[Positive] = Field(
        default_factory=lambda values: max(1, int(values.get("num_cpus", 1))),
        validate_default=False,
    )  # CPU threads; default: num_cpus


class PoolConfig(ProcessConfig):
    """A pool of identical processes."""

    actors: MayChange[Positive] = 1
    min_actors: MayChange[Positive] = 1  # fewer that work or can be restarted end the run
    tensor_parallel: MayChange[Positive] = 1  # GPUs that one model is split over

    @model_validator(mode="after")
    def _minimum_is_reachable(self) -> PoolConfig:
        if self.min_actors > self.actors:
            raise ValueError(
                f"min_actors must be at most actors, got {self.min_actors} > {self.actors}: the run"
                " would end before it starts; lower min_actors or raise actors"
            )
        return self


class TeacherConfig(ModelConfig, PoolConfig):
    """The frozen teacher, and the pool of scorers that runs it."""

    max_batch_tokens: MayChange[Positive] = 8192  # packed into one forward pass
    timeout_s: MayChange[Above0] = 600.0  # of one forward pass; then the scorer is replaced


class LoraConfig(Section):
    """Train low-rank adapters and keep the student's own weights frozen (peft)."""

    rank: Positive = 16
    alpha: Above0 = 32.0
    dropout: Annotated[Number, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class StudentConfig(ModelConfig):
    """The model that learns."""

    lora: LoraConfig | None = None
    gradient_checkpointing: MayChange[bool] = False


# ---- data --------------------------------------------------------------------------------------


# Arguments of transformers' apply_chat_template, and what it defines for the template.
_TEMPLATE_ARGUMENTS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "strftime_now",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}


class ChatTemplate(Section):
    """The tokenizer's own chat template."""

    type: Literal["chat"] = "chat"
    system: str | None = None
    variables: dict[str, JsonValue] = {}  # for the template, as enable_thinking, or tools

    @model_validator(mode="after")
    def _check(self) -> Self:
        taken = sorted(_TEMPLATE_ARGUMENTS & self.variables.keys())
        if taken:
            raise ValueError(
                f"data.template.variables must be names that only the template reads, got"
                f" {', '.join(taken)}: the rendering itself sets them"
            )
        for name in ("tools", "documents"):
            value = self.variables.get(name, [])
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                raise ValueError(
                    f"data.template.variables.{name} must be a list of objects, got {value!r}"
                )
        return self


class PlainTemplate(Section):
    """A named plain template, for base models without a chat template."""

    type: Literal["plain"] = "plain"
    name: Literal["instruction", "raw"] = "instruction"


class ColumnsConfig(Section):
    """Which columns of a row are read. Unset: the names of known data sets are recognized."""

    messages: str | None = None
    prompt: str | None = None
    context: str | None = None  # appended to the prompt, as Alpaca's `input`
    response: str | None = None  # beside `prompt`; unset: the known names
    system: str | None = None  # the system message, beside `prompt` or `messages`

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.messages is not None and (self.prompt or self.context or self.response):
            raise ValueError(
                f"data.columns.messages must stand alone, got {self.messages!r} with another"
                " column: a conversation holds prompt and response"
            )
        named = [name for name in (self.prompt, self.context, self.response, self.system) if name]
        if len(set(named)) < len(named):
            raise ValueError(
                f"data.columns must name a column once, got {', '.join(named)}: a prompt would be"
                " its own response"
            )
        if self.prompt is None and self.messages is None and self.system:
            raise ValueError("data.columns.system needs data.columns.prompt or messages beside it")
        if self.prompt is None and (self.context or self.response):
            raise ValueError(
                "data.columns.prompt is required beside data.columns.context and"
                " data.columns.response: only named columns are read"
            )
        return self


class DataConfig(Section):
    """Files of prompts with responses. JSONL, Parquet or a Hugging Face dataset directory.

    Without `validation`, that fraction of the training prompts is held out, by seed.
    """

    train: tuple[AbsolutePath, ...] = Field(min_length=1)
    validation: tuple[AbsolutePath, ...] = ()
    test: tuple[AbsolutePath, ...] = ()
    validation_fraction: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.05
    columns: ColumnsConfig = ColumnsConfig()
    template: Annotated[
        ChatTemplate | PlainTemplate, Field(discriminator="type"), _type_unless_given("chat")
    ] = ChatTemplate()
    max_prompt_tokens: Positive = 512
    max_response_tokens: Positive = 512
    # What templates see as now; unset: the start of the run.
    time: Annotated[datetime, BeforeValidator(_moment)] | None = None
    # Who wrote the responses of `train`; the teacher's come from `distillm-ray generate`.
    responses: Literal["dataset", "teacher"] = "dataset"
    reasoning: Literal["fail", "keep", "drop"] = "fail"  # thoughts that the template drops
    conversations: Literal["auto", "all", "last", "split"] = "auto"
    """Which responses of a conversation are learned: all in one sequence, the last, or each in a
    sequence of its own. `auto` is all where the template renders earlier turns unchanged, else the
    last."""
    # Plain text beside the prompts, for terms with on: corpus. A row is a document.
    corpus: tuple[AbsolutePath, ...] = ()
    corpus_column: Annotated[str, Field(min_length=1)] = "text"
    # Sequences of the corpus that every step adds to its batch; default: learner.batch_size.
    corpus_batch: Positive | None = None
    bad_rows: Literal["fail", "skip"] = "fail"  # empty or malformed
    long_rows: Literal["fail", "skip"] = "skip"  # longer than the two limits above


# ---- where responses come from -----------------------------------------------------------------


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
            VllmEngine | TransformersEngine, Field(discriminator="type"), _type_unless_given("vllm")
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
        waves = -(-num_requests // (self.batch_size * self.actors)) + 1
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


class TargetsConfig(Section):
    """What the teacher targets of a token are, and the stores and the library that keep them."""

    type: Literal["hidden", "top_k", "logits"] = "hidden"
    k: Positive = 64  # type: top_k
    stores: MayChange[Positive] = 1
    max_bytes: MayChange[Positive] = 2 * 2**30  # of all stores together
    # A directory in which targets outlive the run, shared by runs and by all nodes.
    library: MayChange[AbsolutePath | None] = None
    library_max_bytes: MayChange[Positive] = 50 * 2**30  # on disk, all teachers together


# ---- schedule and buffer -----------------------------------------------------------------------

ReferenceRule: TypeAlias = Literal["best", "last_increase", "previous"]
ReplayRatio: TypeAlias = Literal["decreasing", "constant", "increasing"]
FixedReplayRatio: TypeAlias = Literal[ReplayRatio, "none"]


class AdaptiveSchedule(Section):
    """phi rises by `increment` when validation loss >= reference + tolerance; it never falls."""

    type: Literal["adaptive"] = "adaptive"
    start: Fraction = 0.0
    increment: MayChange[Annotated[Number, Field(gt=0.0, le=1.0)]] = 0.1
    tolerance: MayChange[Amount] = 0.0
    reference: ReferenceRule = "best"
    replay_ratio: ReplayRatio = "decreasing"


class FixedSchedule(Section):
    """A constant phi: 0 trains on the data set only, 1 on student outputs only."""

    type: Literal["fixed"] = "fixed"
    phi: Fraction = 0.0
    replay_ratio: FixedReplayRatio = "none"


class PairedSchedule(Section):
    """Every slot is a pair: the response of the data and a fresh one of the student to its prompt.

    A global batch has twice `learner.batch_size` sequences. Terms hold on one side or on both.
    """

    type: Literal["paired"] = "paired"


ScheduleConfig: TypeAlias = Annotated[
    AdaptiveSchedule | FixedSchedule | PairedSchedule,
    Field(discriminator="type"),
    _type_unless_given("adaptive"),
]


class ReplayConfig(Section):
    """The shelf of student outputs that were trained on once."""

    capacity: Positive = 1000  # sequences
    min_size: Positive | None = None  # replay starts here; default: learner.batch_size


# ---- learner -----------------------------------------------------------------------------------


class LearnerConfig(ProcessConfig):
    """The Ray Train group and its DeepSpeed engine."""

    workers: MayChange[Positive] = 1  # with zero_stage 0 only
    zero_stage: MayChange[Annotated[Integer, Field(ge=0, le=3)]] = 1  # between 1 and 2 only
    steps: MayChange[Positive | None] = None  # optimizer steps; with epochs: at most
    epochs: MayChange[Above0 | None] = None  # passes over data.train, if every slot were of it
    epoch_rows: MayChange[Positive | None] = None  # filled in when the data is read
    batch_size: Positive  # sequences of the global batch
    max_micro_batch_tokens: MayChange[Positive] = 8192  # of one packed row
    learning_rate: MayChange[Above0] = 1e-5
    min_learning_rate_ratio: MayChange[Fraction] = 0.1  # the cosine ends here
    warmup_steps: MayChange[NonNegative] = 0
    weight_decay: MayChange[Amount] = 0.0  # of matrices; biases and norms do not decay
    adam_betas: MayChange[tuple[Number, Number]] = (0.9, 0.95)
    adam_epsilon: MayChange[Above0] = 1e-8
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: to compare runs without Adam's rounding
    max_gradient_norm: MayChange[Above0] = 1.0
    max_skipped_steps: MayChange[NonNegative] = 10  # non-finite steps in a row before the run stops
    prefetch_steps: MayChange[Positive] = 1  # steps collated ahead of the training thread
    data_timeout_s: MayChange[Above0] = 1800.0  # waiting for one step's samples, while training
    max_restarts: MayChange[NonNegative] = 3  # in a row from the same checkpoint

    @property
    def known_steps(self) -> int | None:
        """Optimizer steps of the whole run; None before the rows of an epoch are known."""
        if self.epochs is None:
            return self.steps
        if self.epoch_rows is None:
            return None
        # As written: 1.1 is a little more than 11/10 in binary, which would add a step.
        epochs = FractionOf(str(self.epochs))
        steps = math.ceil(epochs * self.epoch_rows / self.batch_size)
        return min(steps, self.steps or steps)

    @property
    def num_steps(self) -> int:
        """`known_steps` once the data is read (`Config.with_rows`)."""
        steps = self.known_steps
        assert steps is not None, "the steps of an epoch are not known before the data"
        return steps


# ---- the rest ----------------------------------------------------------------------------------


ValidationMetric: TypeAlias = Literal["loss", "rouge_l"]


class ValidationConfig(Section):
    """When the held-out loss is computed, and which prompts show the student's responses."""

    interval: Positive = 100  # optimizer steps
    max_prompts: Positive | None = None  # None: the whole split
    probe_prompts: MayChange[NonNegative] = 4  # responses in the log where weights are new
    # Which of two checkpoints is the better one, for `model-best/` and stop.patience: the lower
    # loss, or the higher ROUGE-L of the responses to `probe_prompts` prompts.
    metric: MayChange[ValidationMetric] = "loss"

    @model_validator(mode="after")
    def _has_probes(self) -> ValidationConfig:
        if self.metric == "rouge_l" and not self.probe_prompts:
            raise ValueError(
                "probe_prompts must be at least 1 with metric: rouge_l, got 0: there would be no"
                " response to score; some hundreds tell checkpoints apart"
            )
        return self


class StopConfig(Section):
    """What ends training before its last step, with a checkpoint and a complete run.

    A step is finished before its budget is looked at, and what steps lost to a restart have cost
    counts as well. A raised budget goes on where the run has ended.
    """

    patience: MayChange[Positive | None] = None  # validations in a row that improve nothing
    min_improvement: MayChange[Amount] = 0.0  # of validation.metric: nats, or points of ROUGE-L
    max_seconds: MayChange[Above0 | None] = None  # of training
    max_generated_tokens: MayChange[Positive | None] = None
    max_teacher_tokens: MayChange[Positive | None] = None  # positions, prompts included

    @property
    def is_set(self) -> bool:
        """Whether any rule is."""
        return any(
            limit is not None
            for limit in (
                self.patience,
                self.max_seconds,
                self.max_generated_tokens,
                self.max_teacher_tokens,
            )
        )


class HeldOutLossConfig(ProcessConfig):
    """The task that computes the held-out loss of a model directory."""

    max_batch_tokens: Positive = 8192  # of one packed row
    timeout_s: Above0 = 1800.0


class EvaluationConfig(Section):
    """ROUGE, BLEU, matches and held-out loss of the student and of the teacher.

    Within a run the student is evaluated by its own generators; `student` is the pool of
    `distillm-ray evaluate`, and of a run whose generators were lost.
    """

    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (10, 20, 30, 40, 50)
    sampling: SamplingConfig = SamplingConfig()
    max_prompts: Positive | None = None
    num_samples_shown: NonNegative = 10  # before/after samples in the run directory
    at_end: MayChange[bool] = True  # evaluate before and after training; may be turned off only
    student: MayChange[GeneratorPoolConfig] = GeneratorPoolConfig()
    teacher: MayChange[GeneratorPoolConfig | None] = GeneratorPoolConfig()  # None: not evaluated
    held_out_loss: MayChange[HeldOutLossConfig] = HeldOutLossConfig()


class CheckpointConfig(Section):
    """When the run's state is saved, and how many checkpoints are kept."""

    interval: MayChange[Positive] = 500  # optimizer steps
    keep: MayChange[Positive] = 2  # the newest ones; the best by validation.metric is kept too
    at_best: MayChange[bool] = False  # also after every validation that is the best so far


class RunConfig(Section):
    """The run itself."""

    directory: MayChange[AbsolutePath]  # shared by all nodes that run a learner
    seed: NonNegative = 0
    mode: Literal["cluster", "local"] = "cluster"  # local: one process, no Ray (local.py)
    device: MayChange[Literal["auto", "cuda", "cpu"]] = "auto"
    startup_timeout_s: MayChange[Above0] = 600.0  # loading one model, on any actor
    timeline_events: MayChange[NonNegative] = 100_000  # in timeline.json at most; 0: no such file


class Config(Section):
    """The whole tree.

    Defaults that follow from another section are filled in when the tree is built, so the resolved
    config shows them: `replay.min_size`, `data.corpus_batch` and every `sampling.max_tokens`.
    """

    method: MayChange[MethodName | None] = None  # its settings (methods.py) stand in their own keys
    run: RunConfig
    teacher: TeacherConfig | None = None  # None: no term of the loss compares with a teacher
    student: StudentConfig
    data: DataConfig
    learner: LearnerConfig
    loss: LossConfig = LossConfig()
    schedule: ScheduleConfig = AdaptiveSchedule()
    rollout: RolloutConfig = RolloutConfig()
    replay: ReplayConfig = ReplayConfig()
    targets: TargetsConfig = TargetsConfig()
    validation: ValidationConfig = ValidationConfig()
    stop: StopConfig = StopConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    generate: GenerateConfig = GenerateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def replay_min_size(self) -> int:
        """Sequences the replay shelf must hold before replay slots replay."""
        assert self.replay.min_size is not None
        return self.replay.min_size

    @property
    def wants_rollouts(self) -> bool:
        """Whether phi can ever be above 0."""
        match self.schedule:
            case AdaptiveSchedule():
                return True
            case FixedSchedule(phi=phi):
                return phi > 0.0
            case PairedSchedule():
                return True

    @property
    def mixes_teacher(self) -> bool:
        """Whether the student text that is trained on is sampled together with the teacher."""
        return self.rollout.teacher_mix > 0.0 and self.wants_rollouts

    @property
    def draws_data(self) -> bool:
        """Whether the responses of the data are trained on. phi never falls: 1 leaves no data."""
        match self.schedule:
            case AdaptiveSchedule(start=phi) | FixedSchedule(phi=phi):
                return phi < 1.0
            case PairedSchedule():
                return True

    @property
    def responses_needed_by(self) -> str | None:
        """The term that trains on the responses of the data; None where prompts are enough."""
        if not self.draws_data:
            return None
        index, term = next(
            (index, term)
            for index, term in enumerate(self.loss.terms)
            if term.covers(self.data.responses)
        )
        return f"loss.terms.{index} ({term.type} on {term.on})"

    @property
    def drawn_text(self) -> tuple[Literal["dataset", "teacher", "student"], ...]:
        """The sources of responses that the run can draw."""
        data = (self.data.responses,) if self.draws_data else ()
        return (*data, "student") if self.wants_rollouts else data

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know of settings that are allowed and unusual."""
        return (
            *self._remarks_on_sampling(),
            *self._remarks_on_mixture(),
            *self._remarks_on_idle_keys(),
        )

    def _remarks_on_idle_keys(self) -> tuple[str, ...]:
        """Keys that are set and have no effect in this run."""
        silent, alone = not self.wants_rollouts, not self.loss.needs_teacher
        steps = self.learner.known_steps
        idle = [
            (silent and self.rollout.teacher_mix > 0, "rollout.teacher_mix", "phi is always 0"),
            (
                silent and self.stop.max_generated_tokens is not None,
                "stop.max_generated_tokens",
                "phi is always 0, so nothing is generated to train on",
            ),
            (
                alone and self.stop.max_teacher_tokens is not None,
                "stop.max_teacher_tokens",
                "no term compares with a teacher",
            ),
            *(
                (
                    has_curriculum(term) and steps is not None and term.anchor_steps >= steps,
                    f"loss.terms.{index}.curriculum",
                    f"the run ends before its anchor is known ({term.anchor_steps} steps)"
                    if has_curriculum(term)
                    else "",
                )
                for index, term in enumerate(self.loss.terms)
            ),
        ]
        return tuple(
            f"warning: {key} has no effect: {reason}" for is_idle, key, reason in idle if is_idle
        )

    def _remarks_on_sampling(self) -> tuple[str, ...]:
        sampling = self.rollout.sampling
        plain = (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
        if plain or not any(
            isinstance(term, PolicyGradient) or term.max_importance is not None
            for term in self.loss.terms
        ):
            return ()
        return (
            "warning: rollout.sampling changes the distribution that responses are sampled from,"
            " and policy gradients and importance weights take them for samples of the student at"
            " temperature 1: their expectation is another one than the reverse KL's gradient",
        )

    def _remarks_on_mixture(self) -> tuple[str, ...]:
        if not self.mixes_teacher:
            return ()
        uncorrected = [
            f"loss.terms.{index} ({term.type} on {term.on})"
            for index, term in enumerate(self.loss.terms)
            if term.on in ("all", "student")
            and not isinstance(term, PolicyGradient)
            and term.max_importance is None
        ]
        if not uncorrected:
            return ()
        return (
            f"warning: rollout.teacher_mix = {self.rollout.teacher_mix:g} samples responses from a"
            f" mixture with the teacher, and {', '.join(uncorrected)} without importance weights:"
            " the expectation is over the mixture's text, not the student's; set max_importance in"
            " a term with on: student",
        )

    @property
    def wants_generators(self) -> bool:
        """Whether a run generates: rollouts, or responses to score the student."""
        return self.wants_rollouts or self.evaluation.at_end or self.validation.metric == "rouge_l"

    @property
    def evaluates_teacher(self) -> bool:
        """Whether a run scores the teacher after training."""
        section = self.evaluation
        return section.at_end and section.teacher is not None and self.teacher is not None

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response that a run reads or generates."""
        return max(
            self.data.max_response_tokens,
            self.rollout.sampling.limit,
            self.evaluation.sampling.limit,
        )

    def with_rows(self, num_rows: int) -> Config:
        """The config for `num_rows` training prompts, which make epochs a number of steps.

        Raises:
            ConfigError: the warm-up is as long as the run, or the run too long to be counted.
        """
        if self.learner.epochs is None:
            return self
        learner = self.learner.model_copy(update={"epoch_rows": num_rows})
        steps = learner.num_steps
        epochs = f"learner.epochs = {learner.epochs:g}"
        if steps > LARGEST_INTEGER:
            raise ConfigError(f"{epochs} are more than {LARGEST_INTEGER:,} steps; lower it")
        if learner.warmup_steps >= steps:
            raise ConfigError(
                f"learner.warmup_steps must be below the steps of {epochs}, got"
                f" {learner.warmup_steps} >= {steps} ({num_rows:,} rows in batches of"
                f" {learner.batch_size}): the learning rate would never reach its peak"
            )
        return self.model_copy(update={"learner": learner})

    @model_validator(mode="wrap")
    @classmethod
    def _complete(cls, values: Any, validate: ModelWrapValidatorHandler[Config]) -> Config:
        """Fill in the defaults that cross sections, then check the rules that do."""
        config = validate(values)
        filled: dict[str, Section] = {}
        if config.data.corpus and config.data.corpus_batch is None:
            filled["data"] = config.data.model_copy(
                update={"corpus_batch": config.learner.batch_size}
            )
        if config.replay.min_size is None:
            filled["replay"] = config.replay.model_copy(
                update={"min_size": config.learner.batch_size}
            )
        for name in ("rollout", "evaluation", "generate"):
            section: RolloutConfig | EvaluationConfig | GenerateConfig = getattr(config, name)
            if section.sampling.max_tokens is None:
                sampling = section.sampling.model_copy(
                    update={"max_tokens": config.data.max_response_tokens}
                )
                filled[name] = section.model_copy(update={"sampling": sampling})
        config = config.model_copy(update=filled)
        config._check()
        return config

    def _check(self) -> None:
        """Rules between sections. Raises ValueError with key, rule and value."""
        batch, minimum, capacity = (
            self.learner.batch_size,
            self.replay_min_size,
            self.replay.capacity,
        )
        if not batch <= minimum <= capacity:
            raise ValueError(
                f"learner.batch_size <= replay.min_size <= replay.capacity must hold, got"
                f" {batch} <= {minimum} <= {capacity}: a step that replays its whole batch draws"
                " without replacement, and a shelf that can never hold min_size never replays"
            )
        if self.learner.workers > batch:
            raise ValueError(
                f"learner.workers must be at most learner.batch_size, got {self.learner.workers}"
                f" > {batch}: a rank would have no sequence"
            )
        if self.loss.needs_teacher and self.teacher is None:
            raise ValueError(
                "teacher.model is required: a term of loss.terms compares with a teacher; name its"
                " model directory, or train with type: cross_entropy alone"
            )
        if self.rollout.teacher_mix > 0.0 and self.teacher is None:
            raise ValueError(
                f"teacher.model is required with rollout.teacher_mix ="
                f" {self.rollout.teacher_mix:g}: every token is sampled from teacher and student"
                " together; name its model directory, or set rollout.teacher_mix=0"
            )
        longest = self.data.max_prompt_tokens + self.longest_response
        limits = {"learner.max_micro_batch_tokens": self.learner.max_micro_batch_tokens}
        if self.teacher is not None:
            limits["teacher.max_batch_tokens"] = self.teacher.max_batch_tokens
        for key, limit in limits.items():
            if limit < longest:
                raise ValueError(
                    f"{key} must hold the longest sequence, data.max_prompt_tokens + the longest"
                    f" response, got {limit} < {longest}"
                )
        for pool_key, pool, key, sampling in (
            ("rollout", self.rollout, "rollout.sampling", self.rollout.sampling),
            ("rollout", self.rollout, "evaluation.sampling", self.evaluation.sampling),
            ("generate", self.generate, "generate.sampling", self.generate.sampling),
        ):
            if isinstance(pool.engine, VllmEngine) and sampling.temperature > 2.0:
                raise ValueError(
                    f"{key}.temperature must be at most 2 with {pool_key}.engine.type=vllm, got"
                    f" {sampling.temperature:g}: vLLM refuses it; lower it or use"
                    f" {pool_key}.engine.type=transformers"
                )
        if self.targets.type == "top_k" and self.loss.has_policy_gradient:
            raise ValueError(
                "targets.type must be hidden or logits with type: policy_gradient, got top_k: the"
                " teacher's probability of a sampled token outside of the k ids is not known"
            )
        if self.targets.type == "top_k" and self.loss.curricula:
            index = self.loss.curricula[0]
            raise ValueError(
                f"targets.type must be hidden or logits with loss.terms.{index}.curriculum=true,"
                " got top_k: the teacher's probability of a token outside of the k ids is not"
                f" known; set loss.terms.{index}.curriculum=false"
            )
        if self.targets.type == "top_k" and self.loss.needs_teacher and self.loss.temperature != 1:
            raise ValueError(
                f"loss.temperature must be 1 with targets.type=top_k, got"
                f" {self.loss.temperature:g}: the tail's probability at another temperature cannot"
                " be computed from k ids; use targets.type=hidden or logits"
            )
        if (
            self.targets.library is not None
            and self.loss.needs_teacher
            and self.teacher is not None
            and self.teacher.dtype == "auto"
        ):
            raise ValueError(
                "teacher.dtype must be bfloat16 or float32 with targets.library, got auto: what it"
                " stands for depends on the processor, and a library is read on other ones; add"
                " teacher.dtype=bfloat16, or float32 where processors do not multiply bfloat16"
            )
        if self.learner.steps is None and self.learner.epochs is None:
            raise ValueError(
                "learner.steps or learner.epochs is required: nothing says how long to train; add"
                " one, as in learner.epochs=3"
            )
        if self.learner.steps is not None and self.learner.warmup_steps >= self.learner.steps:
            raise ValueError(
                f"learner.warmup_steps must be below learner.steps, got"
                f" {self.learner.warmup_steps} >= {self.learner.steps}: the learning rate would"
                " never reach its peak"
            )
        self._check_corpus()
        self._check_terms()

    def _check_corpus(self) -> None:
        """A term on the corpus and the corpus come together."""
        named = bool(self.data.corpus)
        for index, term in enumerate(self.loss.terms):
            if term.on == "corpus" and not named:
                raise ValueError(
                    f"data.corpus is required by loss.terms.{index} ({term.type} on corpus), got no"
                    " files: the term would hold nowhere; name files of plain text, as in"
                    " data.corpus=[corpus.jsonl], or remove the term"
                )
        if named and not any(term.on == "corpus" for term in self.loss.terms):
            covered = ", ".join(sorted({term.on for term in self.loss.terms}))
            raise ValueError(
                f"data.corpus needs a term with on: corpus in loss.terms, got terms on {covered}"
                " only: the corpus would teach nothing (on: all stands for responses); add"
                " {on: corpus, type: cross_entropy} to loss.terms, or remove data.corpus"
            )
        if self.data.corpus_batch is not None and not named:
            raise ValueError(
                f"data.corpus_batch needs data.corpus, got {self.data.corpus_batch} without files:"
                " there is nothing to draw from; name files of plain text, or remove the key"
            )

    def _check_terms(self) -> None:
        """Every term holds on text that is drawn, and all text that is drawn has a term."""
        drawn = self.drawn_text
        for index, term in enumerate(self.loss.terms):
            if term.on not in ("all", "corpus", *drawn):
                reason, remedy = self._why_not_drawn(term.on)
                raise ValueError(
                    f"loss.terms.{index}.on must name text that the run draws"
                    f" ({' or '.join(drawn)}) or be all, got {term.on}: {reason}, so"
                    f" {term.type} would hold nowhere; {remedy}, or remove the term"
                )
        for text in drawn:
            if not any(term.covers(text) for term in self.loss.terms):
                covered = ", ".join(sorted({term.on for term in self.loss.terms}))
                consequence, remedy = _WHY_NOT_COVERED[text]
                raise ValueError(
                    f"loss.terms must cover all text that the run draws"
                    f" ({' and '.join(drawn)}), got terms on {covered} only: {consequence};"
                    f" add a term with on: {text} or on: all, or {remedy}"
                )

    def _why_not_drawn(self, text: Text) -> tuple[str, str]:
        """The reason, and the remedy."""
        if text == "student":
            return "phi is always 0", "raise schedule.phi or set schedule.type=adaptive"
        if not self.draws_data:
            return "phi is always 1", "lower schedule.phi or schedule.start"
        wrote = self.data.responses
        return (
            f"data.responses says that the {'data set' if wrote == 'dataset' else wrote} wrote the"
            " responses of data.train",
            f"set data.responses={text} or on: {wrote}",
        )


def why_not_scored(config: Config) -> str:
    """Why `distillm-ray score` has nothing to do with this config, and the remedy; else empty."""
    if config.targets.library is None:
        return (
            "targets.library is required by `score`, got none: the targets would be thrown away;"
            " name a directory on a disk that all nodes share, as in"
            " targets.library=/shared/targets"
        )
    if not config.loss.needs_teacher:
        return (
            "loss.terms must compare with the teacher to be scored ahead, got only type:"
            " cross_entropy, which needs no targets; `score` has nothing to do for this config"
        )
    data = (config.data.responses,) if config.draws_data else ()
    texts = (*data, "corpus") if config.data.corpus else data
    if not any(config.loss.compares(text) for text in texts):
        held = ", ".join(sorted({term.on for term in config.loss.terms}))
        return (
            f"loss.terms must compare the data with the teacher to be scored ahead, got terms on"
            f" {held} with text of {' and '.join(texts) or 'the student'}: what the student samples"
            " is not known before a run, so `score` has nothing to do for this config"
        )
    return ""


_WHY_NOT_COVERED = {
    "dataset": ("data-set slots would teach nothing", "set schedule={type: fixed, phi: 1}"),
    "teacher": ("the teacher's responses would teach nothing", "set data.responses=dataset"),
    "student": (
        "student outputs would be generated and thrown away",
        "set schedule={type: fixed, phi: 0}",
    ),
}
