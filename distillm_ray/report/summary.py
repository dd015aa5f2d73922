"""A run directory in numbers: the log and the evaluation read, and summed up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from distillm_ray.errors import RunDirectoryError
from distillm_ray.files import write_atomically
from distillm_ray.log.metrics import (
    FILE_NAME,
    Totals,
    count_superseded_steps,
    read_records,
    wall_seconds,
)
from distillm_ray.log.records import (
    DoneRecord,
    Measured,
    Record,
    StartRecord,
    StepRecord,
    ValidationRecord,
)

EVALUATION_FILE = "evaluation.json"
SUMMARY_FILE = "summary.json"
STUDENT_BEFORE, STUDENT_AFTER, TEACHER = "student before", "student after", "teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Mean and standard deviation over sampling seeds; 0..100."""

    mean: float
    std: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """How one model does on the held-out prompts. None or NaN: not computed."""

    validation_loss: Measured = math.nan
    rouge_l: Score | None = None
    bleu: Score | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedSample:
    """One held-out prompt, answered before and after training."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """`evaluation.json`. Keys of `models`: student before, student after, teacher."""

    models: dict[str, ModelScores]
    samples: tuple[ComparedSample, ...] = ()
    num_prompts: int = 0
    seeds: tuple[int, ...] = ()

    def write(self, directory: Path) -> Path:
        """Write `evaluation.json` into a run directory."""
        path = directory / EVALUATION_FILE
        write_atomically(path, _EVALUATION.dump_json(self, indent=2) + b"\n")
        return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """`summary.json`: the run in numbers. Losses in nats a token, NaN where not measured."""

    status: str  # of the last attempt; "running" while no end was logged
    commit: str = ""
    command: str = ""
    steps: int = 0
    superseded_steps: int = 0  # computed and lost to a restart
    wall_seconds: float = 0.0  # of all attempts
    phase_seconds: dict[str, float] = field(default_factory=dict)  # of the last attempt
    first_validation_loss: Measured = math.nan
    best_validation_loss: Measured = math.nan
    last_validation_loss: Measured = math.nan
    final_phi: float = 0.0
    student_share: float = 0.0  # of the sequences trained on: fresh and replayed student outputs
    packing_efficiency: Measured = math.nan  # real tokens / positions computed
    fresh_age_mean: Measured = math.nan
    fresh_age_max: int = 0
    target_hit_rate: Measured = math.nan
    totals: Totals = field(default_factory=Totals)
    notes: tuple[str, ...] = ()

    def write(self, directory: Path) -> Path:
        """Write `summary.json` into a run directory."""
        path = directory / SUMMARY_FILE
        path.write_bytes(_SUMMARY.dump_json(self, indent=2) + b"\n")
        return path


_EVALUATION: TypeAdapter[Evaluation] = TypeAdapter(Evaluation)
_SUMMARY: TypeAdapter[Summary] = TypeAdapter(Summary)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run directory, read."""

    directory: Path
    records: tuple[Record, ...]
    evaluation: Evaluation | None
    superseded_steps: int
    wall_seconds: float


def read_run(directory: Path) -> Run:
    """Read a run directory; the run may still be going on.

    Raises:
        RunDirectoryError: there is no log in it, or the log or evaluation is damaged.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise RunDirectoryError(
            f"{directory} holds no {FILE_NAME}: it is no run directory, or nothing was logged yet"
        )
    return Run(
        directory=directory,
        records=tuple(read_records(path)),
        evaluation=read_evaluation(directory),
        superseded_steps=count_superseded_steps(path),
        wall_seconds=wall_seconds(path),
    )


def has_trained_student(directory: Path) -> bool:
    """Whether a run directory has the scores of a student after training."""
    try:
        evaluation = read_evaluation(directory)
    except RunDirectoryError:
        return False
    return evaluation is not None and STUDENT_AFTER in evaluation.models


def read_evaluation(directory: Path) -> Evaluation | None:
    """The evaluation of a run directory, or None if it has none.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    path = directory / EVALUATION_FILE
    if not path.is_file():
        return None
    try:
        return _EVALUATION.validate_json(path.read_bytes())
    except ValidationError as error:
        raise RunDirectoryError(
            f"{path} is no evaluation ({error.error_count()} problems, the first:"
            f" {error.errors()[0]['msg']}): restore it, or delete it to see the run without"
        ) from error


def summarize(run: Run) -> Summary:
    """The run in numbers."""
    steps = [record for record in run.records if isinstance(record, StepRecord)]
    validations = [record for record in run.records if isinstance(record, ValidationRecord)]
    totals = Totals()
    for record in run.records:
        totals = totals.plus(record)
    start = next((r for r in reversed(run.records) if isinstance(r, StartRecord)), None)
    # an attempt that resumed after the end was logged is running again
    done = next(
        (r for r in reversed(run.records) if isinstance(r, DoneRecord | StartRecord)),
        None,
    )
    done = done if isinstance(done, DoneRecord) else None
    losses = [record.loss for record in validations]
    drawn = totals.fresh + totals.replay + totals.dataset
    lookups = totals.target_hits + totals.target_misses
    positions = sum(record.positions for record in steps)
    num_fresh = sum(r.mix.fresh for r in steps if math.isfinite(r.fresh_age_mean))
    age_sum = sum(r.mix.fresh * r.fresh_age_mean for r in steps if math.isfinite(r.fresh_age_mean))
    return Summary(
        status=done.status if done is not None else "running",
        commit=start.commit if start is not None else "",
        command=start.command if start is not None else "",
        steps=max((record.step for record in steps), default=0),
        superseded_steps=run.superseded_steps,
        wall_seconds=run.wall_seconds,
        phase_seconds=dict(done.phase_seconds) if done is not None else {},
        first_validation_loss=losses[0] if losses else math.nan,
        best_validation_loss=min(losses, default=math.nan),
        last_validation_loss=losses[-1] if losses else math.nan,
        final_phi=validations[-1].phi if validations else (steps[-1].phi if steps else 0.0),
        student_share=(totals.fresh + totals.replay) / drawn if drawn else 0.0,
        packing_efficiency=totals.tokens / positions if positions else math.nan,
        fresh_age_mean=age_sum / num_fresh if num_fresh else math.nan,
        fresh_age_max=max((record.fresh_age_max for record in steps), default=0),
        target_hit_rate=totals.target_hits / lookups if lookups else math.nan,
        totals=totals,
        notes=_notes(totals, run.superseded_steps),
    )


def _notes(totals: Totals, superseded_steps: int) -> tuple[str, ...]:
    notes = []
    if totals.steps and totals.fresh + totals.replay == 0:
        notes.append(
            "this run never drew a student-generated output, it trained off-policy: phi stayed 0,"
            " as a fixed schedule says or because the validation loss of an adaptive one never"
            " asked for more; schedule.phi or schedule.start above 0 changes that"
        )
    if totals.skipped_steps:
        notes.append(f"{totals.skipped_steps} steps were skipped: loss or gradient not finite")
    if totals.infinite_tokens:
        notes.append(
            f"the divergence of {totals.infinite_tokens} tokens was infinite: an id possible for"
            " one model only"
        )
    if totals.late:
        notes.append(
            f"{totals.late} samples were older than rollout.lookahead + rollout.sync_interval - 2"
        )
    if superseded_steps:
        notes.append(f"{superseded_steps} steps were computed again after a restart")
    return tuple(notes)
