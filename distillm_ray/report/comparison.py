"""Several runs side by side: what each reached, and what it cost.

Cost is counted in busy seconds: those in which learners, generators and scorers computed, without
those in which they waited. A run that hides one role's work behind another's saves time, not cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distillm_ray.config.files import load_config
from distillm_ray.errors import RunDirectoryError
from distillm_ray.evaluation.results import STUDENT_AFTER, ModelScores
from distillm_ray.files import check_writable
from distillm_ray.log.records import StepRecord, ValidationRecord
from distillm_ray.report.plots import draw_curves
from distillm_ray.report.scores_table import score_cell
from distillm_ray.report.summary import Run, read_run, summarize
from distillm_ray.run_directory import CONFIG_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The validation losses of a run, and what had been spent until each of them."""

    losses: tuple[float, ...]
    steps: tuple[float, ...]
    seconds: tuple[float, ...]  # of training, waiting included
    generated_tokens: tuple[float, ...]
    busy_seconds: tuple[float, ...]


def compare(directories: Sequence[Path], picture: Path) -> RenderableType:
    """Draw the picture; returns the table and what makes the runs hard to compare.

    Raises:
        RunDirectoryError: fewer than two runs, one of them twice, or one that is no run.
    """
    if len(directories) < 2:
        raise RunDirectoryError(f"compare needs at least two runs, got {len(directories)}")
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise RunDirectoryError("compare needs different runs, got one of them twice")
    if picture.suffix != ".png":
        raise RunDirectoryError(f"--output must be a .png file, got {picture}")
    check_writable(picture.absolute().parent, "--output")
    runs = {_name(directory, directories): read_run(directory) for directory in directories}
    curves = {name: curve(run) for name, run in runs.items()}
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(
        {
            "step": {name: (one.steps, one.losses) for name, one in curves.items()},
            "seconds of training": {
                name: (one.seconds, one.losses) for name, one in curves.items()
            },
            "tokens generated": {
                name: (one.generated_tokens, one.losses) for name, one in curves.items()
            },
            "busy seconds of all roles": {
                name: (one.busy_seconds, one.losses) for name, one in curves.items()
            },
        },
        picture,
        ylabel="validation loss, nats a token",
    )
    warnings = [Text(f"warning: {line}", style="yellow") for line in differences(runs)]
    return Group(_table(runs), Text(f"picture: {picture}"), *warnings)


def curve(run: Run) -> Curve:
    """Losses and sums, validation by validation."""
    seconds = busy = tokens = 0.0
    rows: list[tuple[float, float, float, float, float]] = []
    for record in run.records:
        match record:
            case StepRecord(work=work):
                seconds += record.seconds
                busy += record.learn_seconds + work.generate_seconds + work.score_seconds
                tokens += work.generated_tokens
            case ValidationRecord(loss=loss, step=step):
                rows.append((loss, step, seconds, tokens, busy))
            case _:
                pass
    losses, steps, at, generated, spent = zip(*rows, strict=True) if rows else ((),) * 5
    return Curve(
        losses=losses, steps=steps, seconds=at, generated_tokens=generated, busy_seconds=spent
    )


def differences(runs: dict[str, Run]) -> list[str]:
    """Why a loss or a score of one run may not be held against another's."""
    held_out: dict[str, tuple[str, int] | None] = {}
    for name, run in runs.items():
        first = next((one for one in run.records if isinstance(one, ValidationRecord)), None)
        held_out[name] = None if first is None else (first.text, first.tokens)
    found = []
    datasets = {value for value in held_out.values() if value is not None}
    if any(value[0] == "student" for value in datasets):
        found.append("a run without held-out responses validates on its student's own text")
    if len({tokens for text, tokens in datasets if text == "dataset"}) > 1:
        sizes = ", ".join(f"{name}: {value[1]:,}" for name, value in held_out.items() if value)
        found.append(f"the runs validate on different rows (tokens: {sizes})")
    prompts = {
        name: (run.evaluation.num_prompts, run.evaluation.seeds)
        for name, run in runs.items()
        if run.evaluation is not None
    }
    if len(set(prompts.values())) > 1:
        found.append("the runs are scored on other prompts or with other seeds")
    return found


def _table(runs: dict[str, Run]) -> Table:
    table = Table()
    for name in ("run", "method", "status"):
        table.add_column(name, no_wrap=True)
    columns = (
        *("steps", "validation loss", "ROUGE-L", "exact %"),
        *("seconds", "busy seconds", "tokens generated", "tokens scored"),
    )
    for name in columns:
        table.add_column(name, justify="right")
    for name, run in runs.items():
        summary = summarize(run)
        evaluation = run.evaluation.models if run.evaluation is not None else {}
        scores = evaluation.get(STUDENT_AFTER, ModelScores())
        work = summary.totals.work
        busy = summary.totals.learn_seconds + work.generate_seconds + work.score_seconds
        training = summary.totals.learn_seconds + summary.totals.wait_seconds
        table.add_row(
            name,
            _method(run.directory),
            summary.status,
            str(summary.steps),
            f"{loss:.4f}" if math.isfinite(loss := summary.last_validation_loss) else "-",
            score_cell(scores.rouge_l, interval=True),
            score_cell(scores.exact_match),
            f"{training:,.0f}",
            f"{busy:,.0f}",
            f"{work.generated_tokens:,}",
            f"{work.scored_tokens:,}",
        )
    return table


def _method(directory: Path) -> str:
    path = directory / CONFIG_FILE
    method = load_config(path).method if path.is_file() else None
    return method or "-"


def _name(directory: Path, directories: Sequence[Path]) -> str:
    """The directory's own name where that is enough to tell it from the others."""
    names = [other.name for other in directories]
    return directory.name if names.count(directory.name) == 1 else str(directory)
