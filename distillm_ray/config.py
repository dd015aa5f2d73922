"""One frozen tree: what a run is, in one YAML file plus `key=value` on the command line.

Every role gets its own section and never the whole tree. A choice with parameters is a union on
`type`. Reading happens in config_files.py; here is only what the keys mean and which combinations
make no sense. Importing this costs milliseconds: no torch, no Ray, no vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)


def _no_flag(value: Any) -> Any:
    """pydantic would read true as 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


Positive = Annotated[int, BeforeValidator(_no_flag), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(_no_flag), Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Open01 = Annotated[float, Field(gt=0.0, lt=1.0)]
Dtype: TypeAlias = Literal["auto", "bfloat16", "float32"]
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]
"""Relative to where the job starts; Ray's workers have working directories of their own."""


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


# ---- loss --------------------------------------------------------------------------------------


Text: TypeAlias = Literal["dataset", "student", "teacher", "all"]
"""Who wrote a response."""


class LossTerm(Section):
    """One term of the loss: on which text it holds, and its weight in the sum of all terms."""

    on: Text = "all"
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0

    @property
    def formula(self) -> Self:
        """The term with its parameters only: `on` and `weight` have their defaults."""
        return type(self).model_validate(self.model_dump(exclude={"on", "weight"}))


class ForwardKL(LossTerm):
    """KL(p || q), p the teacher, q the student."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKL(LossTerm):
    """KL(q || p)."""

    type: Literal["reverse_kl"] = "reverse_kl"


class JensenShannon(LossTerm):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""

    type: Literal["jensen_shannon"] = "jensen_shannon"
    beta: float = 0.5

    @model_validator(mode="after")
    def _beta_is_inside(self) -> JensenShannon:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta must lie strictly between 0 and 1, got {self.beta}: at the ends the"
                " divergence is 0 everywhere; use type: forward_kl or type: reverse_kl"
            )
        return self


class SkewKL(LossTerm):
    """KL(p || alpha p + (1 - alpha) q)."""

    type: Literal["skew_kl"] = "skew_kl"
    alpha: Open01 = 0.1


class SkewReverseKL(LossTerm):
    """KL(q || (1 - alpha) p + alpha q)."""

    type: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: Open01 = 0.1


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


Divergence: TypeAlias = (
    ForwardKL | ReverseKL | JensenShannon | SkewKL | SkewReverseKL | TotalVariation | AdaptiveKL
)
Term: TypeAlias = Annotated[Divergence | CrossEntropy, Field(discriminator="type")]


class LossConfig(Section):
    """The terms of the loss, and how tokens are weighted in the global batch."""

    terms: tuple[Term, ...] = (SkewKL(),)
    temperature: Annotated[float, Field(gt=0.0)] = 1.0  # of both distributions in a divergence
    normalize: Literal["source", "tokens", "sequence"] = "source"
    implementation: Literal["fused", "plain"] = "fused"  # plain: the reference, for checking
    chunk_megabytes: Positive | None = None  # of the fused walk's logits; 64 on CPU, 1,024 on GPU

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return any(not isinstance(term, CrossEntropy) for term in self.terms)

    @model_validator(mode="after")
    def _terms_differ(self) -> LossConfig:
        if not self.terms:
            raise ValueError(
                "loss.terms must hold at least one term, got an empty list: there is nothing to"
                " learn; add one, as in loss.terms=[{type: skew_kl}]"
            )
        seen: dict[tuple[str, LossTerm], int] = {}
        for index, term in enumerate(self.terms):
            first = seen.setdefault((term.on, term.formula), index)
            if first != index:
                raise ValueError(
                    f"loss.terms must differ in type, parameters or on, got {term.type} on"
                    f" {term.on} as terms {first} and {index}: they are one term with the sum of"
                    " their weights; keep one and set its weight"
                )
        return self


# ---- models ------------------------------------------------------------------------------------


class TeacherConfig(Section):
    """The frozen teacher and the pool of scorers that run it."""

    model: AbsolutePath
    dtype: Dtype = "auto"  # auto: bfloat16 where the processor computes it natively
    trust_remote_code: bool = False
    actors: Positive = 1
    tensor_parallel: Positive = 1
    max_batch_tokens: Positive = 8192  # a scorer's forward pass packs up to this many tokens
    num_cpus: Annotated[float, Field(ge=0.0)] = 1.0  # per actor
    num_gpus: Annotated[float, Field(ge=0.0)] | None = None  # per actor; None: tensor_parallel
    num_threads: Positive | None = None  # CPU threads of the forward pass; None: num_cpus


class LoraConfig(Section):
    """Train low-rank adapters and keep the student's own weights frozen (peft)."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class StudentConfig(Section):
    """The model that learns. A Hugging Face directory with safetensors."""

    model: AbsolutePath
    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False


# ---- data --------------------------------------------------------------------------------------


class ChatTemplate(Section):
    """The tokenizer's own chat template."""

    type: Literal["chat"] = "chat"
    system: str | None = None


class PlainTemplate(Section):
    """A named plain template, for base models without a chat template."""

    type: Literal["plain"] = "plain"
    name: Literal["instruction", "raw"] = "instruction"


class DataConfig(Section):
    """Files of prompts with responses. JSONL, Parquet or a Hugging Face dataset directory.

    Without `validation`, that fraction of the training prompts is held out, by seed.
    """

    train: tuple[AbsolutePath, ...] = Field(min_length=1)
    validation: tuple[AbsolutePath, ...] = ()
    test: tuple[AbsolutePath, ...] = ()
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    template: Annotated[ChatTemplate | PlainTemplate, Field(discriminator="type")] = ChatTemplate()
    max_prompt_tokens: Positive = 512
    max_response_tokens: Positive = 512
    bad_rows: Literal["fail", "skip"] = "fail"  # empty or malformed
    long_rows: Literal["fail", "skip"] = "skip"  # longer than the two limits above


# ---- where responses come from -----------------------------------------------------------------


class VllmEngine(Section):
    """vLLM's AsyncLLM, on GPUs or on its CPU build."""

    type: Literal["vllm"] = "vllm"
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.85
    cpu_kv_cache_gib: Positive = 1
    max_num_seqs: Positive = 64
    enforce_eager: bool = False  # always on without a GPU


class TransformersEngine(Section):
    """transformers' generate(), for machines where vLLM has no build."""

    type: Literal["transformers"] = "transformers"
    max_batch_size: Positive = 16


class SamplingConfig(Section):
    """How responses are sampled."""

    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegative = 0  # 0: all tokens
    max_tokens: Positive | None = None  # None: data.max_response_tokens
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end tokens


class FilterConfig(Section):
    """Which generated responses are not trained on. Everything is counted either way."""

    drop_looping: bool = False  # repeats an n-gram to the end
    drop_truncated: bool = False  # ended by length


class RolloutConfig(Section):
    """The pool of generators and how far it runs ahead of the learner."""

    engine: Annotated[VllmEngine | TransformersEngine, Field(discriminator="type")] = VllmEngine()
    actors: Positive = 1
    tensor_parallel: Positive = 1
    dtype: Dtype = "auto"
    sampling: SamplingConfig = SamplingConfig()
    filter: FilterConfig = FilterConfig()
    lookahead: Positive = 2  # steps whose fresh samples are in flight or finished
    sync_interval: Positive = 1  # publish weights every so many steps
    max_staleness: NonNegative = 4  # in optimizer steps
    max_in_flight: Positive = 256  # requests per generator
    logprob_warning: Annotated[float, Field(gt=0.0)] = 0.1  # mean |engine - learner|, in nats
    timeout_s: Annotated[float, Field(gt=0.0)] = 600.0  # one response, or one weight update
    num_cpus: Annotated[float, Field(ge=0.0)] = 1.0  # per actor
    num_gpus: Annotated[float, Field(ge=0.0)] | None = None  # per actor; None: tensor_parallel
    num_threads: Positive | None = None  # CPU threads of the engine; None: num_cpus

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


class TargetsConfig(Section):
    """What the teacher's answer looks like, and the stores that keep it."""

    type: Literal["hidden", "top_k", "logits"] = "hidden"
    k: Positive = 64  # type: top_k
    stores: Positive = 1
    max_bytes: Positive = 2 * 2**30  # of all stores together


# ---- schedule and buffer -----------------------------------------------------------------------

ReferenceRule: TypeAlias = Literal["best", "last_increase", "previous"]
ReplayRatio: TypeAlias = Literal["decreasing", "constant", "increasing"]
FixedReplayRatio: TypeAlias = Literal[ReplayRatio, "none"]


class AdaptiveSchedule(Section):
    """phi rises by `increment` when validation loss >= reference + tolerance; it never falls."""

    type: Literal["adaptive"] = "adaptive"
    start: Fraction = 0.0
    increment: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    tolerance: Annotated[float, Field(ge=0.0)] = 0.0
    reference: ReferenceRule = "best"
    replay_ratio: ReplayRatio = "decreasing"


class FixedSchedule(Section):
    """A constant SGO probability: 0 is off-policy, 1 with `fresh: true` is on-policy."""

    type: Literal["fixed"] = "fixed"
    phi: Fraction = 0.0
    replay_ratio: FixedReplayRatio = "none"


ScheduleConfig: TypeAlias = Annotated[AdaptiveSchedule | FixedSchedule, Field(discriminator="type")]


class ReplayConfig(Section):
    """The shelf of student outputs that were trained on once."""

    capacity: Positive = 1000  # sequences
    min_size: Positive | None = None  # replay starts here; None: one global batch


# ---- learner -----------------------------------------------------------------------------------


class LearnerConfig(Section):
    """The Ray Train group and its DeepSpeed engine."""

    workers: Positive = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    steps: Positive
    batch_size: Positive  # sequences of the global batch
    max_micro_batch_tokens: Positive = 8192  # of one packed row
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-5
    min_learning_rate_ratio: Fraction = 0.1  # the cosine ends here
    warmup_steps: NonNegative = 0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: for checks
    max_gradient_norm: Annotated[float, Field(gt=0.0)] = 1.0
    max_skipped_steps: NonNegative = 10  # non-finite steps in a row before the run stops
    prefetch_steps: Positive = 1  # steps collated ahead of the training thread
    data_timeout_s: Annotated[float, Field(gt=0.0)] = 1800.0  # waiting for one step's samples
    max_restarts: NonNegative = 3  # of the group, from the last checkpoint
    num_cpus: Annotated[float, Field(ge=0.0)] = 1.0  # per worker
    num_gpus: Annotated[float, Field(ge=0.0)] | None = None  # per worker; None: 1 if there are any
    num_threads: Positive | None = None  # CPU threads of a worker; None: num_cpus


def cpu_threads(section: TeacherConfig | RolloutConfig | LearnerConfig) -> int:
    """CPU threads that one process of a role computes with."""
    return section.num_threads or max(1, int(section.num_cpus))


# ---- the rest ----------------------------------------------------------------------------------


class ValidationConfig(Section):
    """When the held-out loss is computed, and what is generated to look at."""

    interval: Positive = 100  # optimizer steps
    max_prompts: Positive | None = None  # None: the whole split
    probe_prompts: NonNegative = 4  # answered where a validation finds new weights, for the log


class EvaluationConfig(Section):
    """ROUGE-L and BLEU on the test split, over seeds."""

    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (10, 20, 30, 40, 50)
    sampling: SamplingConfig = SamplingConfig()
    max_prompts: Positive | None = None
    num_samples_shown: NonNegative = 10  # before/after samples in the run directory
    at_end: bool = True  # evaluate before and after training, within the job


class CheckpointConfig(Section):
    """When the run's state is saved, and how much of it is kept."""

    interval: Positive = 500  # optimizer steps
    keep: Positive = 2  # newest; the best by validation loss is kept besides


class RunConfig(Section):
    """The run itself."""

    directory: AbsolutePath  # shared by all nodes that run a learner
    seed: NonNegative = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"
    startup_timeout_s: Annotated[float, Field(gt=0.0)] = 600.0


class Config(Section):
    """The whole tree."""

    run: RunConfig
    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    learner: LearnerConfig
    loss: LossConfig = LossConfig()
    schedule: ScheduleConfig = AdaptiveSchedule()
    rollout: RolloutConfig = RolloutConfig()
    replay: ReplayConfig = ReplayConfig()
    targets: TargetsConfig = TargetsConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def replay_min_size(self) -> int:
        """Sequences the replay shelf must hold before replay slots replay."""
        return self.replay.min_size or self.learner.batch_size

    @property
    def wants_rollouts(self) -> bool:
        """Whether phi can ever be above 0."""
        match self.schedule:
            case AdaptiveSchedule():
                return True
            case FixedSchedule(phi=phi):
                return phi > 0.0

    @property
    def drawn_text(self) -> tuple[Literal["dataset", "student"], ...]:
        """The sources of text that the run can draw. phi never falls, so phi 1 leaves no data."""
        phi = self.schedule.start if self.schedule.type == "adaptive" else self.schedule.phi
        student = ("student",) if self.wants_rollouts else ()
        return student if phi == 1.0 else ("dataset", *student)

    @property
    def max_response_tokens(self) -> int:
        """Longest response that the student may generate."""
        return self.rollout.sampling.max_tokens or self.data.max_response_tokens

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response that anything in the run reads or generates."""
        evaluated = self.evaluation.sampling.max_tokens or 0
        return max(self.data.max_response_tokens, self.max_response_tokens, evaluated)

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
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
        longest = self.data.max_prompt_tokens + self.longest_response
        for key, limit in (
            ("learner.max_micro_batch_tokens", self.learner.max_micro_batch_tokens),
            ("teacher.max_batch_tokens", self.teacher.max_batch_tokens),
        ):
            if limit < longest:
                raise ValueError(
                    f"{key} must hold the longest sequence, data.max_prompt_tokens + the longest"
                    f" response, got {limit} < {longest}"
                )
        for key, sampling in (
            ("rollout.sampling", self.rollout.sampling),
            ("evaluation.sampling", self.evaluation.sampling),
        ):
            if isinstance(self.rollout.engine, VllmEngine) and sampling.temperature > 2.0:
                raise ValueError(
                    f"{key}.temperature must be at most 2 with rollout.engine.type=vllm, got"
                    f" {sampling.temperature:g}: vLLM refuses it; lower it or use"
                    " rollout.engine.type=transformers"
                )
        if isinstance(self.rollout.engine, TransformersEngine) and self.rollout.tensor_parallel > 1:
            raise ValueError(
                f"rollout.tensor_parallel must be 1 with rollout.engine.type=transformers, got"
                f" {self.rollout.tensor_parallel}: that engine runs on one device; raise"
                " rollout.actors, or use rollout.engine.type=vllm"
            )
        if self.targets.type == "top_k" and self.loss.needs_teacher and self.loss.temperature != 1:
            raise ValueError(
                f"loss.temperature must be 1 with targets.type=top_k, got"
                f" {self.loss.temperature:g}: the tail's probability at another temperature cannot"
                " be computed from k ids; use targets.type=hidden or logits"
            )
        if self.learner.warmup_steps >= self.learner.steps:
            raise ValueError(
                f"learner.warmup_steps must be below learner.steps, got"
                f" {self.learner.warmup_steps} >= {self.learner.steps}: the learning rate would"
                " never reach its peak"
            )
        return self

    @model_validator(mode="after")
    def _terms_fit_the_text(self) -> Config:
        drawn = self.drawn_text
        for index, term in enumerate(self.loss.terms):
            if term.on != "all" and term.on not in drawn:
                reason, remedy = _WHY_NOT_DRAWN[term.on]
                raise ValueError(
                    f"loss.terms.{index}.on must name text that the run draws"
                    f" ({' or '.join(drawn)}) or be all, got {term.on}: {reason}, so"
                    f" {term.type} would hold nowhere; {remedy}, or remove the term"
                )
        for text in drawn:
            if all(term.on not in ("all", text) for term in self.loss.terms):
                covered = ", ".join(sorted({term.on for term in self.loss.terms}))
                consequence, remedy = _WHY_NOT_COVERED[text]
                raise ValueError(
                    f"loss.terms must cover all text that the run draws"
                    f" ({' and '.join(drawn)}), got terms on {covered} only: {consequence};"
                    f" add a term with on: {text} or on: all, or {remedy}"
                )
        return self


_WHY_NOT_DRAWN = {
    "dataset": ("phi is always 1", "lower schedule.phi or schedule.start"),
    "student": ("phi is always 0", "raise schedule.phi or set schedule.type=adaptive"),
    "teacher": ("no part of a run draws teacher responses yet", "use on: dataset"),
}
_WHY_NOT_COVERED = {
    "dataset": ("data-set slots would teach nothing", "set schedule={type: fixed, phi: 1}"),
    "student": (
        "student outputs would be generated and thrown away",
        "set schedule={type: fixed, phi: 0}",
    ),
}
