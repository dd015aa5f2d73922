"""What a run writes down: one frozen record a step or event, one JSON object a line.

The train loop knows a step's `TrainStep` and what was drawn; the rollout loop and the stores know
how much work they have done so far (`Counters`). `StepRecord.build` puts the two together. Steps
are completed optimizer steps: the first is 1, and 0 is before training. JSON has no NaN and no
infinity, so a non-finite number is written as null and read back as NaN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, TypeAdapter

from distillm_ray.types import DrawFacts, Mix, TrainStep

Measured: TypeAlias = Annotated[
    float, BeforeValidator(lambda value: math.nan if value is None else value)
]
"""A number that can be non-finite, or that was not measured (NaN)."""

UNKNOWN_STEP = -1
"""Of an event whose witness does not follow the steps; the log puts in its newest one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Work done by the roles beside the learner since the job, or the actor, started."""

    generated_sequences: int = 0
    generated_tokens: int = 0  # response tokens
    scored_sequences: int = 0
    scored_tokens: int = 0  # positions that the teacher's forward pass computed
    target_hits: int = 0  # sequences whose targets a store had
    target_misses: int = 0
    target_evictions: int = 0
    empty: int = 0  # responses without a token, or with the end token only
    truncated: int = 0
    looping: int = 0
    dropped: int = 0  # by the filter
    lost: int = 0  # ordinals given out again
    duplicates: int = 0
    late: int = 0  # trained on at an age above rollout.lookahead + rollout.sync_interval - 2
    generate_seconds: float = 0.0  # with at least one call to the role under way
    score_seconds: float = 0.0
    sync_seconds: float = 0.0  # generators taking new weights

    def plus(self, **more: int) -> Counters:
        """With counts of other roles added."""
        return dataclasses.replace(
            self, **{name: getattr(self, name) + value for name, value in more.items()}
        )

    def since(self, earlier: Counters) -> Counters:
        """The work between two readings; none where a count fell because its actor was replaced."""
        return Counters(
            **{
                item.name: max(0, getattr(self, item.name) - getattr(earlier, item.name))
                for item in dataclasses.fields(self)
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSizes:
    """What the replay buffer and the target stores hold at this moment."""

    fresh: int = 0  # finished ordinals that no step has taken yet
    replay: int = 0
    in_flight: int = 0  # ordinals given out and not finished
    target_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRecord:
    """A process began or resumed the run, from checkpoint `step` on."""

    kind: Literal["start"] = "start"
    step: int
    time: float = 0.0
    resumed: bool = False
    commit: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step. Work is what was done since the step before it."""

    kind: Literal["step"] = "step"
    step: int
    time: float = 0.0  # seconds since the epoch, set by the log
    loss: Measured
    loss_by_shelf: dict[str, Measured] = field(default_factory=dict)
    loss_by_term: dict[str, Measured] = field(default_factory=dict)  # before each term's weight
    learning_rate: float = 0.0
    gradient_norm: Measured = math.nan
    tokens: int = 0
    loss_tokens: int = 0
    positions: int = 0
    seconds: float = 0.0  # of the learner, waiting included
    wait_seconds: float = 0.0
    skipped: bool = False
    infinite_tokens: int = 0
    rank_token_imbalance: float = 0.0
    phi: float = 0.0
    psi: float = 0.0  # rollout rate
    mix: Mix = field(default_factory=Mix)
    rollout_ids: dict[str, tuple[str, ...]] = field(default_factory=dict)  # drawn, by shelf
    fresh_age_mean: Measured = math.nan  # NaN without fresh samples
    fresh_age_max: int = 0
    replay_age_mean: Measured = math.nan
    buffer: BufferSizes = BufferSizes()
    work: Counters = Counters()
    logprob_gap: Measured = math.nan  # mean |engine - learner| over fresh tokens, in nats

    @classmethod
    def build(
        cls,
        train: TrainStep,
        draw: DrawFacts,
        *,
        buffer: BufferSizes,
        work: Counters,
    ) -> StepRecord:
        """Join what the learner reports with what the other roles did since the last step."""
        return cls(
            **dataclasses.asdict(train),
            phi=draw.phi,
            psi=draw.psi,
            mix=draw.mix,
            rollout_ids=draw.rollout_ids,
            fresh_age_mean=_mean(draw.fresh_ages),
            fresh_age_max=max(draw.fresh_ages, default=0),
            replay_age_mean=_mean(draw.replay_ages),
            buffer=buffer,
            work=work,
        )

    @property
    def learn_seconds(self) -> float:
        """Seconds of the learner without its waiting."""
        return max(self.seconds - self.wait_seconds, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRecord:
    """Held-out loss after `step`, and the schedule that follows from it."""

    kind: Literal["validation"] = "validation"
    step: int
    time: float = 0.0
    loss: Measured
    tokens: int = 0
    phi: float = 0.0  # holds from here on
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishRecord:
    """Weights of version `step` went out to the generators."""

    kind: Literal["publish"] = "publish"
    step: int
    time: float = 0.0
    nbytes: int = 0
    seconds: float = 0.0  # gathering and handing over, on the learner's side


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """The run's state after `step` is on disk."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    time: float = 0.0
    path: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A held-out prompt, the data set's answer and a model's."""

    prompt: str
    reference: str
    response: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRecord:
    """The student's answers to a few held-out prompts after `step`."""

    kind: Literal["probe"] = "probe"
    step: int
    time: float = 0.0
    samples: tuple[Sample, ...] = ()
    logprob_gap: Measured = math.nan  # mean |engine - learner| over these answers, in nats


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """Something that happened: an actor was restarted, an ordinal lost."""

    kind: Literal["event"] = "event"
    step: int = UNKNOWN_STEP
    time: float = 0.0
    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneRecord:
    """The job ended as it was asked to. A job that failed leaves no such record."""

    kind: Literal["done"] = "done"
    step: int
    time: float = 0.0
    status: Literal["complete", "stopped"]
    seconds: float = 0.0  # wall-clock of this attempt
    phase_seconds: dict[str, float] = field(default_factory=dict)


Record: TypeAlias = (
    StartRecord
    | StepRecord
    | ValidationRecord
    | PublishRecord
    | CheckpointRecord
    | ProbeRecord
    | EventRecord
    | DoneRecord
)

_RECORDS: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def to_json(record: Record) -> str:
    """One line, without the line break."""
    return _RECORDS.dump_json(record).decode()


def from_json(value: Any) -> Record:
    """The record of a parsed JSON object; unknown fields are left out.

    Raises:
        ValueError: it is no record.
    """
    return _RECORDS.validate_python(value)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else math.nan
