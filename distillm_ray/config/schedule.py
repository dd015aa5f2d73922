"""`schedule` and `replay`: which text a step draws."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from distillm_ray.config.fields import (
    Amount,
    Fraction,
    MayChange,
    Number,
    Positive,
    Section,
    type_unless_given,
)

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
    type_unless_given("adaptive"),
]


class ReplayConfig(Section):
    """The shelf of student outputs that were trained on once."""

    capacity: Positive = 1000  # sequences
    min_size: Positive | None = None  # replay starts here; default: learner.batch_size
