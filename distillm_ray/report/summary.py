"""A run directory in numbers: reads the log and the evaluation, writes `summary.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from distillm_ray.errors import RunDirectoryError
from distillm_ray.evaluation.results import Evaluation, read_evaluation
from distillm_ray.log.metrics import FILE_NAME, read_log
from distillm_ray.log.records import (
    DoneRecord,
    Record,
    StartRecord,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.log.totals import Totals

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The content of `summary.json`. Losses are in nats a token.

    NaN where a number was not measured or does not apply; null in the file.
    """

    status: str  # of the last attempt; "running" until its end is logged
    commit: str = ""
    command: str = ""
    steps: int = 0
    superseded_steps: int = 0  # computed, lost to a restart and computed again
    wall_seconds: float = 0.0  # of all attempts
    phase_seconds: dict[str, float] = field(default_factory=dict)  # of the last attempt
    first_validation_loss: float = math.nan
    best_validation_loss: float = math.nan
    last_validation_loss: float = math.nan
    final_phi: float = 0.0
    student_share: float = 0.0  # fresh and replayed / all responses trained on, without the corpus
    packing_efficiency: float = math.nan  # tokens / positions computed by the learners
    fresh_age_mean: float = math.nan
    fresh_age_max: int = 0
    generators_mean: float = math.nan  # that worked, over the steps
    generators_max: int = 0
    scorers_mean: float = math.nan
    scorers_max: int = 0
    # 1 - scored / trained on, of the sequences that a term compares with the teacher.
    target_reuse_sequences: float = math.nan
    target_reuse_tokens: float = math.nan
    # Of scorers, for the targets that targets.library had, as measured when these were scored.
    teacher_seconds_saved: float = math.nan
    totals: Totals = field(default_factory=Totals)
    notes: tuple[str, ...] = ()

    def write(self, directory: Path) -> None:
        """Write `summary.json` into a run directory."""
        content = _SUMMARY.dump_json(self, indent=2)
        (directory / SUMMARY_FILE).write_bytes(content + b"\n")


_SUMMARY: TypeAdapter[Summary] = TypeAdapter(Summary)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run directory holds."""

    directory: Path
    records: tuple[Record, ...]
    evaluation: Evaluation | None
    superseded_steps: int
    wall_seconds: float


def read_run(directory: Path) -> Run:
    """Read a run directory; the run may still be in progress.

    Raises:
        RunDirectoryError: the directory has no log, or its log or evaluation is damaged.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise RunDirectoryError(
            f"{directory} holds no {FILE_NAME}: not a run directory, or nothing was logged yet"
        )
    log = read_log(path)
    return Run(
        directory=directory,
        records=log.records,
        evaluation=read_evaluation(directory),
        superseded_steps=log.superseded_steps,
        wall_seconds=log.wall_seconds,
    )


def summarize(run: Run) -> Summary:
    """Compute the summary of a run."""
    steps = [record for record in run.records if isinstance(record, StepRecord)]
    validations = [record for record in run.records if isinstance(record, ValidationRecord)]
    totals = Totals.of(run.records)
    start = next((r for r in reversed(run.records) if isinstance(r, StartRecord)), None)
    # The last of the two kinds: an attempt that resumed after a logged end is running again.
    last = next((r for r in reversed(run.records) if isinstance(r, DoneRecord | StartRecord)), None)
    done = last if isinstance(last, DoneRecord) else None
    losses = [record.loss for record in validations]
    drawn = totals.mix.responses
    with_fresh = [record for record in steps if record.mix.fresh]
    age_sum = sum(record.mix.fresh * record.fresh_age_mean for record in with_fresh)
    return Summary(
        status=done.status if done is not None else "running",
        commit=start.commit if start is not None else "",
        command=start.command if start is not None else "",
        steps=totals.last_step,
        superseded_steps=run.superseded_steps,
        wall_seconds=run.wall_seconds,
        phase_seconds=dict(done.phase_seconds) if done is not None else {},
        first_validation_loss=losses[0] if losses else math.nan,
        best_validation_loss=min(losses, default=math.nan),
        last_validation_loss=losses[-1] if losses else math.nan,
        final_phi=validations[-1].phi if validations else (steps[-1].phi if steps else 0.0),
        student_share=(totals.mix.fresh + totals.mix.replay) / drawn if drawn else 0.0,
        packing_efficiency=totals.tokens / totals.positions if totals.positions else math.nan,
        fresh_age_mean=age_sum / totals.mix.fresh if totals.mix.fresh else math.nan,
        fresh_age_max=max((record.fresh_age_max for record in steps), default=0),
        generators_mean=_mean([record.actors.generators for record in steps]),
        generators_max=max((record.actors.generators for record in steps), default=0),
        scorers_mean=_mean([record.actors.scorers for record in steps]),
        scorers_max=max((record.actors.scorers for record in steps), default=0),
        target_reuse_sequences=totals.target_reuse_sequences,
        target_reuse_tokens=totals.target_reuse_tokens,
        teacher_seconds_saved=totals.work.library_seconds if totals.has_targets else math.nan,
        totals=totals,
        notes=_notes(totals, run.superseded_steps),
    )


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else math.nan


def _notes(totals: Totals, superseded_steps: int) -> tuple[str, ...]:
    """What a reader should know of the run, in sentences."""
    notes = []
    if totals.steps and totals.mix.fresh + totals.mix.replay == 0:
        notes.append(
            "this run never drew a student-generated output and trained off-policy: phi stayed 0,"
            " either because the schedule is fixed at 0 or because the validation loss never made"
            " the adaptive schedule raise it; set schedule.phi or schedule.start above 0 to change"
            " that"
        )
    if totals.skipped_steps:
        notes.append(f"{totals.skipped_steps} steps were skipped: loss or gradient not finite")
    if totals.infinite_tokens:
        notes.append(
            f"the divergence of {totals.infinite_tokens} tokens was infinite: only one of the two"
            " models gives their ids a probability above 0"
        )
    if totals.work.late:
        notes.append(
            f"{totals.work.late} samples were older than"
            " rollout.lookahead + rollout.sync_interval - 2"
        )
    if superseded_steps:
        notes.append(f"{superseded_steps} steps were computed again after a restart")
    return tuple(notes)
