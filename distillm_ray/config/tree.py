"""The whole tree."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ModelWrapValidatorHandler, model_validator

from distillm_ray.config.colocation import check_colocated, with_parts
from distillm_ray.config.data import DataConfig
from distillm_ray.config.fields import LARGEST_INTEGER, MayChange, Section, shown_range
from distillm_ray.config.loss import LossConfig, Text
from distillm_ray.config.roles import (
    ActorRange,
    LearnerConfig,
    StudentConfig,
    TargetsConfig,
    TeacherConfig,
)
from distillm_ray.config.rollout import GenerateConfig, RolloutConfig, VllmEngine
from distillm_ray.config.run import (
    CheckpointConfig,
    EvaluationConfig,
    RunConfig,
    StopConfig,
    ValidationConfig,
)
from distillm_ray.config.schedule import (
    AdaptiveSchedule,
    FixedSchedule,
    PairedSchedule,
    ReplayConfig,
    ScheduleConfig,
)
from distillm_ray.errors import ConfigError
from distillm_ray.methods import MethodName


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
    def is_colocated(self) -> bool:
        """Whether learners and generators share devices, in turns."""
        return self.run.placement == "colocated"

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
        if config.is_colocated:
            learner, rollout = with_parts(config.learner, config.rollout)
            config = config.model_copy(update={"learner": learner, "rollout": rollout})
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
        if self.run.device == "cpu" and self.learner.offload != "none":
            raise ValueError(
                f"learner.offload must be none with run.device=cpu, got {self.learner.offload}: it"
                " moves state from a GPU to main memory or disk; set learner.offload=none"
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
        fixed = {
            "evaluation.student": self.evaluation.student,
            "evaluation.teacher": self.evaluation.teacher,
            "generate": self.generate,
        }
        for key, fixed_pool in fixed.items():
            if fixed_pool is not None and isinstance(fixed_pool.actors, ActorRange):
                shown = shown_range(fixed_pool.actors.model_dump(include={"min", "max"}))
                raise ValueError(
                    f"{key}.actors must be one number, got {shown}: its prompts are all known at"
                    " once, and no learner waits for it; only rollout.actors and teacher.actors may"
                    f" be a range; set {key}.actors={fixed_pool.most}"
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
        if self.is_colocated:
            check_colocated(
                self.run,
                self.learner,
                self.rollout,
                self.teacher,
                generates=self.wants_generators,
            )

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


_WHY_NOT_COVERED = {
    "dataset": ("data-set slots would teach nothing", "set schedule={type: fixed, phi: 1}"),
    "teacher": ("the teacher's responses would teach nothing", "set data.responses=dataset"),
    "student": (
        "student outputs would be generated and thrown away",
        "set schedule={type: fixed, phi: 0}",
    ),
}
