"""`run`, `validation`, `stop`, `evaluation` and `checkpoint`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from distillm_ray.cache_directory import cache_directory
from distillm_ray.config.fields import (
    Above0,
    Amount,
    Location,
    MayChange,
    NonNegative,
    Positive,
    Section,
)
from distillm_ray.config.remote_path import RemotePath
from distillm_ray.config.roles import ProcessConfig
from distillm_ray.config.rollout import GeneratorPoolConfig, SamplingConfig

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

    # A path that all nodes with a learner share, or an address in an object store.
    directory: MayChange[Location]
    seed: NonNegative = 0
    mode: Literal["cluster", "local"] = "cluster"  # local: one process, no Ray (local.py)
    device: MayChange[Literal["auto", "cuda", "cpu"]] = "auto"
    # colocated: a learner and a generator on each GPU, in turns. Scorers have GPUs of their own.
    placement: MayChange[Literal["separate", "colocated"]] = "separate"
    startup_timeout_s: MayChange[Above0] = 600.0  # loading one model, on any actor
    # Where Prometheus finds the metrics of a cluster that the run starts by itself, on all
    # interfaces and without a token; None: nowhere. Other clusters have a port of their own.
    metrics_port: MayChange[Annotated[int, Field(ge=1024, le=65535)] | None] = None
    log_rollout_ids: MayChange[bool] = False  # of every step in metrics.jsonl, not the digest alone
    timeline_events: MayChange[NonNegative] = 100_000  # in timeline.json at most; 0: no such file

    def below(self, name: str) -> Path | RemotePath:
        """A part of the run directory, which other nodes may read."""
        if isinstance(self.directory, Path):
            return self.directory / name
        return self.directory.child(name)

    @property
    def local_directory(self) -> Path:
        """Where processes read and write the run's files: the directory, or its copy on the node.

        A run in a store has a copy on the node of the driver and on each node with a learner.
        """
        if isinstance(self.directory, Path):
            return self.directory
        digest = hashlib.blake2b(str(self.directory).encode(), digest_size=8).hexdigest()
        return cache_directory() / "runs" / digest / self.directory.name
