"""When a run ends before its last step. Pure: decided from the records of its log.

The same rule says to the learners that a run ends, to the driver that it has ended, and to the
command that resumes it that there is nothing left to do. A raised budget therefore goes on from the
last checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from distillm_ray.config import Config, StopConfig, ValidationMetric
from distillm_ray.log.metrics import FILE_NAME, read_log, read_records
from distillm_ray.log.records import (
    EventRecord,
    ProbeRecord,
    Record,
    StepRecord,
    ValidationRecord,
)

ENDED_EARLY = "ended early"
"""Name of the event with which the learners log the rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the rules look at."""

    seconds: float = 0.0  # of steps, in all attempts; validations and checkpoints aside
    generated_tokens: int = 0
    teacher_tokens: int = 0  # positions that the teacher computed
    best: float = math.nan  # of the metric; NaN before the first validation
    best_step: int = 0
    to_beat: float = math.nan  # the last value that improved by more than `min_improvement`
    stale: int = 0  # validations since then

    @classmethod
    def of(
        cls,
        records: Iterable[Record],
        lost: Iterable[Record] = (),
        *,
        metric: ValidationMetric = "loss",
        min_improvement: float = 0.0,
    ) -> Standing:
        """After `records`. `lost` were superseded: they cost as much, but say nothing of quality.

        Example:
            >>> losses = [ValidationRecord(step=step, loss=loss) for step, loss in
            ...           ((0, 3.0), (10, 2.0), (20, 2.1), (30, 2.2))]
            >>> standing = Standing.of(losses)
            >>> standing.best, standing.best_step, standing.stale
            (2.0, 10, 2)
        """
        standing = cls()
        for record in lost:
            if isinstance(record, StepRecord):
                standing = standing._paying(record)
        for record in records:
            standing = standing.plus(record, metric=metric, min_improvement=min_improvement)
        return standing

    def plus(
        self, record: Record, *, metric: ValidationMetric, min_improvement: float = 0.0
    ) -> Standing:
        """With one more record."""
        match record:
            case StepRecord():
                return self._paying(record)
            case ValidationRecord(step=step, loss=loss) if metric == "loss":
                return self._judging(step, loss, sign=-1.0, min_improvement=min_improvement)
            case ProbeRecord(step=step, rouge_l=score) if metric == "rouge_l":
                return self._judging(step, score, sign=1.0, min_improvement=min_improvement)
            case _:
                return self

    def _paying(self, record: StepRecord) -> Standing:
        return replace(
            self,
            seconds=self.seconds + record.seconds,
            generated_tokens=self.generated_tokens + record.work.generated_tokens,
            teacher_tokens=self.teacher_tokens + record.work.scored_tokens,
        )

    def _judging(self, step: int, value: float, *, sign: float, min_improvement: float) -> Standing:
        """`sign` is 1 where more is better, else -1. NaN improves nothing."""
        standing = replace(self, stale=self.stale + 1)
        if math.isnan(value):
            return standing
        if math.isnan(self.best) or sign * (value - self.best) > 0:
            standing = replace(standing, best=value, best_step=step)
        if math.isnan(self.to_beat) or sign * (value - self.to_beat) > min_improvement:
            standing = replace(standing, to_beat=value, stale=0)
        return standing


def why_stop(stop: StopConfig, standing: Standing) -> str:
    """The rule that ends the run, with its numbers; empty while it goes on."""
    if stop.patience is not None and standing.stale >= stop.patience:
        plural = "s" if standing.stale > 1 else ""
        least = f" by more than {stop.min_improvement:g}" if stop.min_improvement else ""
        return (
            f"stop.patience: {standing.stale} validation{plural} without an improvement on"
            f" {standing.to_beat:.4f}{least}"
        )
    for key, spent, limit in (
        ("max_seconds", standing.seconds, stop.max_seconds),
        ("max_generated_tokens", standing.generated_tokens, stop.max_generated_tokens),
        ("max_teacher_tokens", standing.teacher_tokens, stop.max_teacher_tokens),
    ):
        if limit is not None and spent >= limit:
            digits = ".1f" if key == "max_seconds" else ".0f"
            return f"stop.{key}: {spent:,{digits}} of {limit:,{digits}} are spent"
    return ""


def read_standing(config: Config) -> Standing:
    """Of the run in `run.directory`."""
    log = read_log(config.run.local_directory / FILE_NAME)
    return Standing.of(
        log.records,
        log.superseded,
        metric=config.validation.metric,
        min_improvement=config.stop.min_improvement,
    )


def spent_without_a_checkpoint(config: Config) -> str:
    """The budget that attempts without a checkpoint have spent already; empty if there is none."""
    if not config.stop.is_set:
        return ""
    log = read_log(config.run.local_directory / FILE_NAME)
    return why_stop(config.stop, Standing.of((), (*log.records, *log.superseded)))


def has_ended(config: Config, step: int) -> bool:
    """Whether the run in `run.directory` has nothing left to do after its checkpoint of `step`.

    An early end counts once the learners have logged it, after they wrote the model.
    """
    if step == config.learner.known_steps:
        return True
    if not config.stop.is_set or not why_stop(config.stop, read_standing(config)):
        return False
    return any(
        isinstance(record, EventRecord) and record.name == ENDED_EARLY and record.step == step
        for record in read_records(config.run.local_directory / FILE_NAME)
    )
