"""Signs that on-policy training runs away, found in the records of a run. Pure.

Each sign compares the last WINDOW steps that have student text with the first WINDOW of them, or
with a share that no healthy run has, and is told once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from distillm_ray.log.records import EventRecord, StepRecord

WINDOW = 20
"""Steps of both averages."""
LONGER = 2.0
"""Growth of the mean response that is a warning, if many responses are cut off as well."""
CUT_OFF = 0.5
"""Share of responses that end by the length limit in such a window."""
COLLAPSED = 0.25
"""Entropy of the student, as a share of what it was and of what the teacher's is."""
LOOPING = 0.2
EMPTY = 0.2
"""Shares of responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthWatch:
    """What was seen until now."""

    first: tuple[StepRecord, ...] = ()
    last: tuple[StepRecord, ...] = ()
    told: frozenset[str] = field(default_factory=frozenset)

    def after(self, record: StepRecord) -> tuple[HealthWatch, tuple[EventRecord, ...]]:
        """With one more step; returns the signs that it shows for the first time."""
        if not record.work.generated_sequences and math.isnan(record.student_entropy):
            return self, ()
        first = self.first if len(self.first) == WINDOW else (*self.first, record)
        last = (*self.last, record)[-WINDOW:]
        watch = replace(self, first=first, last=last)
        if len(last) < WINDOW:
            return watch, ()
        signs = {
            name: detail
            for name, sign in SIGNS.items()
            if name not in self.told and (detail := sign(first, last))
        }
        events = tuple(
            EventRecord(step=record.step, name=name, detail=detail)
            for name, detail in signs.items()
        )
        return replace(watch, told=self.told | signs.keys()), events


def _length_explosion(first: Sequence[StepRecord], last: Sequence[StepRecord]) -> str:
    before, now, cut = _length(first), _length(last), _share(last, "truncated")
    if not (now > LONGER * before and cut > CUT_OFF):
        return ""
    return (
        f"responses have grown from {before:.0f} to {now:.0f} tokens, and {cut:.0%} end by the"
        " length limit: the student learns from text that never ends; set"
        " rollout.filter.drop_truncated=true, raise rollout.sampling.max_tokens, or train on data"
        " as well (schedule.phi below 1)"
    )


def _entropy_collapse(first: Sequence[StepRecord], last: Sequence[StepRecord]) -> str:
    before, now = _mean(first, "student_entropy"), _mean(last, "student_entropy")
    teacher = _mean(last, "teacher_entropy")
    if not (now < COLLAPSED * before and now < COLLAPSED * teacher):
        return ""
    return (
        f"the student's entropy has fallen from {before:.2f} to {now:.2f} nats a token, the"
        f" teacher's is {teacher:.2f}: the student's text loses its variety; lower"
        " learner.learning_rate, or use a divergence that covers the teacher (skew_kl,"
        " jensen_shannon) instead of a reverse one"
    )


def _loops(first: Sequence[StepRecord], last: Sequence[StepRecord]) -> str:
    share = _share(last, "looping")
    if not share > LOOPING:
        return ""
    return (
        f"{share:.0%} of the responses repeat themselves to the end: set"
        " rollout.filter.drop_looping=true, or begin with more data (schedule.start)"
    )


def _empties(first: Sequence[StepRecord], last: Sequence[StepRecord]) -> str:
    share = _share(last, "empty")
    if not share > EMPTY:
        return ""
    return (
        f"{share:.0%} of the responses are empty: the student ends before it begins; look at the"
        " probes in the log, and at the template's end tokens with `distillm-ray check`"
    )


SIGNS: dict[str, Callable[[Sequence[StepRecord], Sequence[StepRecord]], str]] = {
    "length explosion": _length_explosion,
    "entropy collapse": _entropy_collapse,
    "looping responses": _loops,
    "empty responses": _empties,
}
"""Event names, with what finds the sign: the sentence for the user, or nothing."""


def _length(steps: Sequence[StepRecord]) -> float:
    responses = sum(step.work.generated_sequences for step in steps)
    return sum(step.work.generated_tokens for step in steps) / responses if responses else math.nan


def _share(steps: Sequence[StepRecord], counter: str) -> float:
    responses = sum(step.work.generated_sequences for step in steps)
    return sum(getattr(step.work, counter) for step in steps) / responses if responses else math.nan


def _mean(steps: Sequence[StepRecord], name: str) -> float:
    """Over the steps that have the figure."""
    values = [value for step in steps if math.isfinite(value := getattr(step, name))]
    return statistics.fmean(values) if values else math.nan
