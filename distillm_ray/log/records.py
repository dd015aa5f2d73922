"""The records of a run: one frozen dataclass a step or event, one JSON object a line.

`metrics.jsonl` holds the fields of a record as they stand here. A `step` object has the fields of
`TrainStep` (loss, tokens, seconds, ...) at its top level, beside `phi`, `psi`, the ages of the
samples, `draw_digest` and four objects: `mix` (what was drawn, by shelf), `buffer` (`BufferSizes`),
`actors` (`ActorCounts`) and `work` (`Counters`). With `run.log_rollout_ids` it also has
`rollout_ids`, the ids by shelf. Every object has `kind`, `step` and `time`.

Steps are completed optimizer steps: the first is 1, and 0 is before training. JSON has no NaN and
no infinity, so a non-finite number is written as null; null is read as NaN.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from distillm_ray.log.costs import Role, RoleCost
from distillm_ray.types import DrawFacts, Mix, TrainStep

UNKNOWN_STEP = -1
"""Step of an event whose sender does not follow the steps; the log replaces it by the newest."""

REWOUND = "rewound"
"""Name of the event that the learners went back to a checkpoint."""

COST_INTERVAL_S = 10.0
"""Shortest time between two cost records of a phase: ten roles take a kilobyte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Work of the roles other than the learner, counted from the start of the job or the actor."""

    generated_sequences: int = 0  # to be trained on
    generated_tokens: int = 0  # response tokens
    probe_sequences: int = 0  # responses to held-out prompts, those of the evaluation included
    probe_tokens: int = 0
    scored_sequences: int = 0
    scored_tokens: int = 0  # positions that the teacher computed, prompts included
    library_sequences: int = 0  # whose targets were found in targets.library, and not scored
    library_tokens: int = 0  # positions of these
    library_seconds: float = 0.0  # that the teacher needed for them when it scored them
    target_evictions: int = 0  # targets that a store removed to make room for others
    empty: int = 0  # responses without a token, or with the end token only
    truncated: int = 0
    looping: int = 0
    dropped: int = 0  # by the filter
    lost: int = 0  # ordinals given out again
    given_up: int = 0  # prompts at which generators failed, again and again
    duplicates: int = 0
    late: int = 0  # trained on at an age above rollout.lookahead + rollout.sync_interval - 2
    generate_seconds: float = 0.0  # wall-clock with at least one call to the role in progress
    score_seconds: float = 0.0
    sync_seconds: float = 0.0  # generators loading new weights

    def plus(self, other: Counters) -> Counters:
        """The sum of both, counter by counter."""
        return Counters(
            **{name: getattr(self, name) + getattr(other, name) for name in _COUNTER_NAMES}
        )

    def since(self, earlier: Counters) -> Counters:
        """The work between two readings. 0 where a count fell because its actor was replaced."""
        return Counters(
            **{
                name: max(0, getattr(self, name) - getattr(earlier, name))
                for name in _COUNTER_NAMES
            }
        )


_COUNTER_NAMES = tuple(item.name for item in dataclasses.fields(Counters))


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSizes:
    """What the replay buffer and the target stores hold at the time of a step."""

    fresh: int = 0  # finished ordinals that no step has taken yet
    replay: int = 0
    in_flight: int = 0  # ordinals given out and not finished
    target_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorCounts:
    """The members of the pools at the time of a step. Those that failed and are missing are not."""

    generators: int = 0  # ready for calls
    generators_starting: int = 0  # waiting for room in the cluster, or loading
    scorers: int = 0
    scorers_starting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRecord:
    """A process started or resumed the run from checkpoint `step`."""

    kind: Literal["start"] = "start"
    step: int
    time: float = 0.0
    resumed: bool = False
    commit: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord(TrainStep):
    """One optimizer step: the learners' report, what was drawn, and the other roles' work."""

    kind: Literal["step"] = "step"
    time: float = 0.0  # seconds since the epoch, set by the log
    phi: float = 0.0
    psi: float = 0.0  # rollout rate
    mix: Mix = field(default_factory=Mix)
    draw_digest: str = ""  # of the ids drawn: a resumed run has those of an undisturbed one
    # Drawn, by shelf; left out without run.log_rollout_ids.
    rollout_ids: Annotated[dict[str, tuple[str, ...]], Field(exclude_if=operator.not_)] = field(
        default_factory=dict
    )
    untargeted_sequences: int = 0  # of those drawn: no term compares them with the teacher
    untargeted_tokens: int = 0  # of these sequences, prompts included
    fresh_age_mean: float = math.nan  # NaN without fresh samples
    fresh_age_max: int = 0
    replay_age_mean: float = math.nan  # NaN without replayed samples
    buffer: BufferSizes = BufferSizes()
    actors: ActorCounts = ActorCounts()
    work: Counters = Counters()  # since the previous step

    @classmethod
    def build(
        cls,
        train: TrainStep,
        draw: DrawFacts,
        *,
        buffer: BufferSizes,
        work: Counters,
        actors: ActorCounts | None = None,
    ) -> StepRecord:
        """Join the learners' report with the work of the other roles since the previous step."""
        return cls(
            **dataclasses.asdict(train),
            phi=draw.phi,
            psi=draw.psi,
            mix=draw.mix,
            draw_digest=draw.draw_digest,
            rollout_ids=draw.rollout_ids,
            untargeted_sequences=draw.untargeted_sequences,
            untargeted_tokens=draw.untargeted_tokens,
            fresh_age_mean=_mean(draw.fresh_ages),
            fresh_age_max=max(draw.fresh_ages, default=0),
            replay_age_mean=_mean(draw.replay_ages),
            buffer=buffer,
            actors=actors or ActorCounts(),
            work=work,
        )

    @property
    def learn_seconds(self) -> float:
        """Seconds of the learner without the time it waited for data."""
        return max(self.seconds - self.wait_seconds, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRecord:
    """Held-out loss after `step`, and the phi that the schedule derives from it."""

    kind: Literal["validation"] = "validation"
    step: int
    time: float = 0.0
    loss: float
    text: Literal["dataset", "student"] = "dataset"
    """Held-out responses, whose loss is the cross-entropy, or the student's own to held-out prompts
    without a response, whose loss is the divergence from the teacher."""
    tokens: int = 0
    phi: float = 0.0  # from the next draw on
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishRecord:
    """The learners published the weights of version `step`."""

    kind: Literal["publish"] = "publish"
    step: int
    time: float = 0.0
    nbytes: int = 0
    seconds: float = 0.0  # of the learners: gathering and handing over


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A complete checkpoint of the run after `step`."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    time: float = 0.0
    path: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A held-out prompt with the data set's response and a model's."""

    prompt: str
    reference: str
    response: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRecord:
    """The student's responses to a few held-out prompts after `step`."""

    kind: Literal["probe"] = "probe"
    step: int
    time: float = 0.0
    samples: tuple[Sample, ...] = ()
    logprob_gap: float = math.nan  # mean |engine - learner| over these responses, in nats
    rouge_l: float = math.nan  # 0 to 100, mean over the prompts that have a reference


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRecord:
    """What every role has used since the record before, all of it in one phase of the driver.

    Written with the first step after COST_INTERVAL_S, and at the end of every phase. It is never
    superseded: what was lost to a restart was paid for.
    """

    kind: Literal["cost"] = "cost"
    step: int = UNKNOWN_STEP
    time: float = 0.0
    phase: str
    seconds: float  # wall-clock
    roles: dict[Role, RoleCost] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """An incident outside of the steps, such as a restarted actor or a lost ordinal."""

    kind: Literal["event"] = "event"
    step: int = UNKNOWN_STEP
    time: float = 0.0
    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneRecord:
    """The job ended without a failure. A job that failed leaves no such record."""

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
    | CostRecord
    | EventRecord
    | DoneRecord
)

_RECORDS: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def to_json(record: Record) -> str:
    """One line, without the line break."""
    return _RECORDS.dump_json(record).decode()


def from_json(value: dict[str, Any]) -> Record:
    """The record of a parsed JSON object; unknown fields are ignored.

    Raises:
        ValueError: the object is not a record.
    """
    return _RECORDS.validate_python(_nan_for_null(value))


def is_from_checkpoint(record: Record) -> bool:
    """Whether the steps after it follow a checkpoint: of an earlier process, or after a failure."""
    match record:
        case StartRecord(resumed=resumed):
            return resumed
        case EventRecord(name=name):
            return name == REWOUND
        case _:
            return False


def _nan_for_null(value: Any) -> Any:  # any JSON value
    match value:
        case None:
            return math.nan
        case dict():
            return {name: _nan_for_null(item) for name, item in value.items()}
        case _:
            return value


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else math.nan
