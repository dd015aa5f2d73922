"""What a run exports to Prometheus: the table of its metrics, and what a record says of them. Pure.

`Metric` is the table; docs/metrics.md shows it and the dashboard in deploy/grafana queries it. The
functions below turn a record, a phase or the state of a pool into readings, which
cluster/metrics_export.py hands to Ray.

A counter counts from the start of the process that exports it, and never falls: steps that were
lost to a restart are in it. `rate` and `increase` are what it is for; the sums of a run as it
stands are in its `summary.json`. A gauge that is not known, such as the age of fresh samples in a
step without any, keeps its last value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias

from distillm_ray.log.costs import Role, RoleCost
from distillm_ray.log.records import (
    REWOUND,
    CheckpointRecord,
    CostRecord,
    EventRecord,
    ProbeRecord,
    PublishRecord,
    Record,
    StartRecord,
    StepRecord,
    ValidationRecord,
)

PREFIX = "ray_"
"""What Ray puts before the name of every metric."""

RUN = "run"
"""The label that all of them have: the name of the run directory."""

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]

_STEP_BUCKETS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A metric."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()  # beside `run`; their values are few, whatever the run's length
    buckets: tuple[float, ...] = ()  # upper bounds, of a histogram

    @property
    def exported(self) -> str:
        """Its name in Prometheus; a histogram has `_bucket`, `_sum` and `_count` after it."""
        return PREFIX + self.name


def _gauge(name: str, unit: str, meaning: str, *labels: str) -> Definition:
    return Definition(
        name=f"distillm_{name}", kind="gauge", unit=unit, meaning=meaning, labels=labels
    )


def _counter(name: str, unit: str, meaning: str, *labels: str) -> Definition:
    return Definition(
        name=f"distillm_{name}_total", kind="counter", unit=unit, meaning=meaning, labels=labels
    )


class Metric(Enum):
    """All metrics, in the order of the table."""

    # the run
    STEP = _gauge("step", "steps", "completed optimizer steps")
    PLANNED_STEPS = _gauge("planned_steps", "steps", "`learner.steps`, or what `epochs` come to")
    PHASE = _gauge("phase", "0 or 1", "1 for the phase that the driver is in", "phase")
    REWINDS = _counter("rewinds", "times", "the learners went back to their checkpoint")
    WEIGHTS_VERSION = _gauge("weights_version", "steps", "the newest published weights")
    PUBLISHED_BYTES = _counter("published_bytes", "bytes", "published weights")
    CHECKPOINT_STEP = _gauge("checkpoint_step", "steps", "the newest checkpoint")
    CHECKPOINT_TIME = _gauge(
        "checkpoint_timestamp_seconds",
        "Unix time",
        "the newest checkpoint became complete; its age is `time()` minus this",
    )
    CHECKPOINT_SECONDS = _gauge("checkpoint_seconds", "seconds", "the newest checkpoint took")

    # a step
    LOSS = _gauge("loss", "nats", "the loss of the newest step")
    TERM_LOSS = _gauge("term_loss", "nats", "each term of it, before its weight", "term")
    VALIDATION_LOSS = _gauge("validation_loss", "nats", "the newest held-out loss")
    LEARNING_RATE = _gauge("learning_rate", "", "of the newest step")
    GRADIENT_NORM = _gauge("gradient_norm", "", "of the newest step, before it is clipped")
    PHI = _gauge("phi", "probability", "a slot takes student text")
    PSI = _gauge("psi", "probability", "a slot takes fresh student text")
    SLOTS = _counter("slots", "sequences", "trained on, by the shelf they are from", "shelf")
    TRAINED_TOKENS = _counter("trained_tokens", "tokens", "trained on, prompts included")
    INFINITE_TOKENS = _counter("infinite_tokens", "tokens", "left out: the divergence is infinite")
    SKIPPED_STEPS = _counter("skipped_steps", "steps", "loss or gradient was not finite")
    STEP_SECONDS = Definition(
        name="distillm_step_seconds",
        kind="histogram",
        unit="seconds",
        meaning="a step of the learners took, waiting for data included",
        buckets=_STEP_BUCKETS,
    )
    LEARNER_SECONDS = _counter(
        "learner_seconds",
        "seconds",
        "of the learners: `compute`, `wait`, `publish`, `validate`, `checkpoint`",
        "activity",
    )
    SAMPLE_AGE = _gauge(
        "sample_age_steps", "steps", "mean age of the samples: `fresh`, `replay`", "shelf"
    )
    FRESH_AGE_MAX = _gauge("fresh_age_max_steps", "steps", "age of the oldest fresh sample")
    LATE_SAMPLES = _counter("late_samples", "samples", "trained on at a higher age than planned")

    # health of the student's text
    STUDENT_ENTROPY = _gauge("student_entropy", "nats", "of the next token, on student text")
    TEACHER_ENTROPY = _gauge("teacher_entropy", "nats", "likewise, of the teacher")
    TOP_OVERLAP = _gauge("top_overlap", "0 to 1", "of the most likely tokens of both")
    LOGPROB_GAP = _gauge(
        "logprob_gap", "nats", "mean difference of engine and learner, under the same weights"
    )
    PROBE_ROUGE_L = _gauge("probe_rouge_l", "0 to 100", "of the responses to held-out prompts")

    # generation and scoring
    GENERATED_SEQUENCES = _counter("generated_sequences", "responses", "generated to train on")
    GENERATED_TOKENS = _counter("generated_tokens", "tokens", "of these responses")
    FLAWED_SEQUENCES = _counter(
        "flawed_sequences", "responses", "of them `truncated`, `empty` or `looping`", "flaw"
    )
    DROPPED_SEQUENCES = _counter("dropped_sequences", "responses", "rejected by `rollout.filter`")
    LOST_ORDINALS = _counter("lost_ordinals", "ordinals", "given out again, dropped ones included")
    GIVEN_UP_PROMPTS = _counter("given_up_prompts", "prompts", "generators kept failing at them")
    TARGETED_SEQUENCES = _counter(
        "targeted_sequences", "sequences", "trained on with teacher targets"
    )
    SCORED_SEQUENCES = _counter(
        "scored_sequences", "sequences", "computed by the teacher; the other targets were reused"
    )
    SCORED_TOKENS = _counter("scored_tokens", "tokens", "of these, prompts included")
    LIBRARY_SEQUENCES = _counter(
        "library_sequences", "sequences", "whose targets were in `targets.library`"
    )
    TARGET_EVICTIONS = _counter("target_evictions", "targets", "removed to make room for others")

    # what the buffer and the stores hold
    BUFFER_SEQUENCES = _gauge(
        "buffer_sequences", "sequences", "on the shelves `fresh` and `replay`", "shelf"
    )
    IN_FLIGHT = _gauge("in_flight_ordinals", "ordinals", "demanded and not finished")
    TARGET_BYTES = _gauge("target_bytes", "bytes", "of teacher targets in the stores")

    # pools: generators and scorers
    POOL_SIZE = _gauge("pool_size", "actors", "of the pool", "role")
    POOL_READY = _gauge("pool_ready", "actors", "of them started and alive", "role")
    POOL_BUSY = _gauge("pool_busy", "actors", "of them with a call in progress", "role")
    POOL_QUEUE = _gauge("pool_queue", "calls", "wait for a free actor", "role")
    POOL_RESTARTS = _counter("pool_restarts", "times", "an actor was replaced", "role")

    # what the roles use
    PROCESS_SECONDS = _counter(
        "process_seconds",
        "seconds",
        "wall-clock of all processes: its rate is their number",
        "role",
    )
    CPU_SECONDS = _counter("cpu_seconds", "seconds", "user and system", "role")
    GPU_SECONDS = _counter("gpu_seconds", "seconds", "devices held x seconds", "role")
    BUSY_SECONDS = _counter("busy_seconds", "seconds", "with a call in progress", "role")
    QUEUE_SECONDS = _counter("queue_seconds", "seconds", "of calls that waited", "role")
    ROLE_TOKENS = _counter("role_tokens", "tokens", "generated, scored, trained on", "role")


# ---- readings ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A value to set (gauge), to observe (histogram) or to add (counter)."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()  # values, in the order of the metric's labels


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """A pool of actors at a moment."""

    role: Role
    size: int
    ready: int
    busy: int
    queue: int  # calls that wait for a free actor
    restarts: int  # since the pool was made


def of_record(record: Record) -> Iterator[Reading]:
    """What a record says, without what is not finite and without increments of 0."""
    yield from (reading for reading in _all_of(record) if _counts(reading))


def of_phase(phase: str, before: str) -> Iterator[Reading]:
    """The driver goes from one phase to another."""
    yield Reading(metric=Metric.PHASE, value=0, labels=(before,))
    yield Reading(metric=Metric.PHASE, value=1, labels=(phase,))


def of_pool(state: PoolState, before: PoolState | None) -> Iterator[Reading]:
    """The state of a pool, and its restarts since the state before."""
    restarts = state.restarts - (0 if before is None else before.restarts)
    values = {
        Metric.POOL_SIZE: state.size,
        Metric.POOL_READY: state.ready,
        Metric.POOL_BUSY: state.busy,
        Metric.POOL_QUEUE: state.queue,
        Metric.POOL_RESTARTS: restarts,
    }
    for metric, value in values.items():
        reading = Reading(metric=metric, value=value, labels=(state.role,))
        if _counts(reading):
            yield reading


def _counts(reading: Reading) -> bool:
    if reading.metric.value.kind == "counter":
        return reading.value > 0 and math.isfinite(reading.value)
    return math.isfinite(reading.value)


def _all_of(record: Record) -> Iterator[Reading]:
    match record:
        case StartRecord():
            yield Reading(metric=Metric.STEP, value=record.step)
        case StepRecord():
            yield from _of_step(record)
        case ValidationRecord():
            yield Reading(metric=Metric.VALIDATION_LOSS, value=record.loss)
            yield _learner_seconds("validate", record.seconds)
        case PublishRecord():
            yield Reading(metric=Metric.WEIGHTS_VERSION, value=record.step)
            yield Reading(metric=Metric.PUBLISHED_BYTES, value=record.nbytes)
            yield _learner_seconds("publish", record.seconds)
        case CheckpointRecord():
            yield Reading(metric=Metric.CHECKPOINT_STEP, value=record.step)
            yield Reading(metric=Metric.CHECKPOINT_TIME, value=record.time)
            yield Reading(metric=Metric.CHECKPOINT_SECONDS, value=record.seconds)
            yield _learner_seconds("checkpoint", record.seconds)
        case ProbeRecord():
            yield Reading(metric=Metric.PROBE_ROUGE_L, value=record.rouge_l)
        case CostRecord():
            for role, cost in record.roles.items():
                yield from _of_cost(role, cost)
        case EventRecord(name=name) if name == REWOUND:
            yield Reading(metric=Metric.REWINDS, value=1)
            yield Reading(metric=Metric.STEP, value=record.step)
        case _:
            pass


def _of_step(record: StepRecord) -> Iterator[Reading]:
    work, buffer, mix = record.work, record.buffer, record.mix
    values: dict[Metric, float] = {
        Metric.STEP: record.step,
        Metric.LOSS: record.loss,
        Metric.LEARNING_RATE: record.learning_rate,
        Metric.GRADIENT_NORM: record.gradient_norm,
        Metric.PHI: record.phi,
        Metric.PSI: record.psi,
        Metric.TRAINED_TOKENS: record.tokens,
        Metric.INFINITE_TOKENS: record.infinite_tokens,
        Metric.SKIPPED_STEPS: record.skipped,
        Metric.STEP_SECONDS: record.seconds,
        Metric.LATE_SAMPLES: work.late,
        Metric.STUDENT_ENTROPY: record.student_entropy,
        Metric.TEACHER_ENTROPY: record.teacher_entropy,
        Metric.TOP_OVERLAP: record.top_overlap,
        Metric.LOGPROB_GAP: record.logprob_gap,
        Metric.GENERATED_SEQUENCES: work.generated_sequences,
        Metric.GENERATED_TOKENS: work.generated_tokens,
        Metric.DROPPED_SEQUENCES: work.dropped,
        Metric.LOST_ORDINALS: work.lost,
        Metric.GIVEN_UP_PROMPTS: work.given_up,
        Metric.TARGETED_SEQUENCES: mix.total - record.untargeted_sequences,
        Metric.SCORED_SEQUENCES: work.scored_sequences,
        Metric.SCORED_TOKENS: work.scored_tokens,
        Metric.LIBRARY_SEQUENCES: work.library_sequences,
        Metric.TARGET_EVICTIONS: work.target_evictions,
        Metric.IN_FLIGHT: buffer.in_flight,
        Metric.TARGET_BYTES: buffer.target_bytes,
    }
    if mix.fresh:
        values[Metric.FRESH_AGE_MAX] = record.fresh_age_max
    for metric, value in values.items():
        yield Reading(metric=metric, value=float(value))
    yield _learner_seconds("compute", record.learn_seconds)
    yield _learner_seconds("wait", record.wait_seconds)
    by_label: dict[Metric, dict[str, float]] = {
        Metric.TERM_LOSS: record.loss_by_term,
        Metric.SLOTS: {
            "fresh": mix.fresh,
            "replay": mix.replay,
            "dataset": mix.dataset,
            "corpus": mix.corpus,
        },
        Metric.SAMPLE_AGE: {"fresh": record.fresh_age_mean, "replay": record.replay_age_mean},
        Metric.BUFFER_SEQUENCES: {"fresh": buffer.fresh, "replay": buffer.replay},
        Metric.FLAWED_SEQUENCES: {
            "truncated": work.truncated,
            "empty": work.empty,
            "looping": work.looping,
        },
    }
    for metric, labelled in by_label.items():
        for label, value in labelled.items():
            yield Reading(metric=metric, value=value, labels=(label,))


def _of_cost(role: Role, cost: RoleCost) -> Iterator[Reading]:
    values: dict[Metric, float] = {
        Metric.PROCESS_SECONDS: cost.seconds,
        Metric.CPU_SECONDS: cost.cpu_seconds,
        Metric.GPU_SECONDS: cost.gpu_seconds,
        Metric.BUSY_SECONDS: cost.busy_seconds,
        Metric.QUEUE_SECONDS: cost.queue_seconds,
        Metric.ROLE_TOKENS: cost.tokens,
    }
    for metric, value in values.items():
        yield Reading(metric=metric, value=value, labels=(role,))


def _learner_seconds(activity: str, seconds: float) -> Reading:
    return Reading(metric=Metric.LEARNER_SECONDS, value=seconds, labels=(activity,))
