"""What a run leaves for its reader: the figures, `samples.md`, and the table at the end."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distillm_ray.errors import RunDirectoryError
from distillm_ray.log.metrics import FILE_NAME
from distillm_ray.report.console import duration
from distillm_ray.report.plots import draw_all, draw_overview
from distillm_ray.report.summary import (
    EVALUATION_FILE,
    STUDENT_AFTER,
    STUDENT_BEFORE,
    SUMMARY_FILE,
    TEACHER,
    ComparedSample,
    Evaluation,
    ModelScores,
    Run,
    Score,
    Summary,
    read_evaluation,
    read_run,
    summarize,
)
from distillm_ray.run_directory import MODEL_FOLDER

SAMPLES_FILE = "samples.md"
PLOTS_FOLDER = "plots"


def write_report(directory: Path, *, compare: Sequence[Path] = ()) -> RenderableType:
    """Write `summary.json`, `plots/` and (after an evaluation) `samples.md`; return the table.

    Args:
        directory: the run.
        compare: other run directories, whose evaluations become rows of the table.

    Raises:
        RunDirectoryError: a directory is no run, or one to compare has no evaluation.
    """
    run = read_run(directory)
    others: dict[str, ModelScores] = {}
    for other in compare:
        evaluation = read_evaluation(other)
        if evaluation is None or STUDENT_AFTER not in evaluation.models:
            raise RunDirectoryError(
                f"{other} holds no {EVALUATION_FILE} with a trained student to compare with:"
                " a run that ended, with evaluation.at_end, has one"
            )
        others[f"student after ({other.name})"] = evaluation.models[STUDENT_AFTER]
    summary = summarize(run)
    summary.write(directory)
    commit = f"commit {summary.commit}" if summary.commit else ""
    draw_overview(
        run.records,
        directory / PLOTS_FOLDER / "overview.png",
        title=summary.command or directory.name,
        subtitle=commit,
    )
    draw_all(run.records, directory / PLOTS_FOLDER)
    if run.evaluation is not None and run.evaluation.samples:
        write_samples(directory / SAMPLES_FILE, run.evaluation.samples)
    return render_report(run, summary, others)


def write_samples(path: Path, samples: Sequence[ComparedSample]) -> None:
    """Before and after, side by side for a reader, as Markdown."""
    parts = ["# Held-out prompts, answered before and after training\n"]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"## {number}\n")
        for name, text in (
            ("Prompt", sample.prompt),
            ("Reference", sample.reference),
            ("Before", sample.before),
            ("After", sample.after),
        ):
            quoted = "\n".join(f"> {line}" for line in (text.strip() or "(empty)").splitlines())
            parts.append(f"**{name}**\n\n{quoted}\n")
    path.write_text("\n".join(parts), encoding="utf-8")


def render_report(
    run: Run, summary: Summary, others: Mapping[str, ModelScores] | None = None
) -> RenderableType:
    """The end of a run on a terminal: scores, seconds, where things are."""
    parts: list[RenderableType] = []
    if run.evaluation is not None:
        parts.append(_scores(run.evaluation, others or {}))
    parts.append(_seconds(summary))
    parts.append(_places(run.directory))
    parts.extend(Text(f"note: {note}", style="yellow") for note in summary.notes)
    return Group(*parts)


def git_commit(directory: Path) -> str:
    """Short hash of the commit that `directory` is at, "+" if files differ; "" outside of git."""
    git = shutil.which("git")
    if git is None:
        return ""
    command = [
        git,
        "-C",
        str(directory),
        "describe",
        "--always",
        "--dirty=+",
        "--abbrev=9",
    ]
    found = subprocess.run(
        [*command, "--exclude=*"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return found.stdout.strip() if found.returncode == 0 else ""


def _scores(evaluation: Evaluation, others: Mapping[str, ModelScores]) -> Table:
    seeds = f", {len(evaluation.seeds)} seeds" if evaluation.seeds else ""
    title = f"{evaluation.num_prompts} held-out prompts{seeds}"
    table = Table(title=title if evaluation.num_prompts else None, title_justify="left")
    table.add_column("model")
    for name in ("validation loss", "ROUGE-L", "BLEU"):
        table.add_column(name, justify="right")
    order = (STUDENT_BEFORE, STUDENT_AFTER, TEACHER)
    rows = {name: evaluation.models[name] for name in order if name in evaluation.models}
    rows |= {name: scores for name, scores in evaluation.models.items() if name not in order}
    for name, scores in (rows | dict(others)).items():
        loss = f"{scores.validation_loss:.3f}" if math.isfinite(scores.validation_loss) else "-"
        style = "bold" if name == STUDENT_AFTER else None
        table.add_row(name, loss, _score(scores.rouge_l), _score(scores.bleu), style=style)
    return table


def _seconds(summary: Summary) -> Table:
    totals = summary.totals
    table = Table(title=f"{summary.steps} steps, {summary.status}", title_justify="left")
    for name in ("seconds spent", "", "work"):
        table.add_column(name, justify="right" if name == "" else "left")
    hits = _percent(summary.target_hit_rate)
    generated = f"{totals.generated_tokens:,} tokens in {totals.generated_sequences:,} responses"
    scored = f"{totals.scored_tokens:,} tokens; {hits} of the targets were there already"
    learned = f"{totals.tokens:,} tokens: {totals.fresh:,} fresh, {totals.replay:,} replayed,"
    rows = (
        ("generating", totals.generate_seconds, generated),
        ("scoring", totals.score_seconds, scored),
        (
            "learning",
            totals.learn_seconds,
            f"{learned} {totals.dataset:,} data-set sequences",
        ),
        ("waiting (learner)", totals.wait_seconds, ""),
        (
            "taking new weights",
            totals.sync_seconds,
            f"{totals.publishes} versions published",
        ),
    )
    for name, seconds, work in rows:
        table.add_row(name, f"{seconds:.1f}", work)
    table.add_section()
    table.add_row(
        "wall-clock",
        f"{summary.wall_seconds:.1f}",
        f"{duration(summary.wall_seconds)} in all",
    )
    return table


def _places(directory: Path) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, place in (
        ("model", directory / MODEL_FOLDER),
        ("log", directory / FILE_NAME),
        ("plots", directory / PLOTS_FOLDER),
        ("samples", directory / SAMPLES_FILE),
        ("summary", directory / SUMMARY_FILE),
    ):
        if place.exists():
            table.add_row(name, Text(str(place)))
    return table


def _score(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.mean:.1f} ± {score.std:.1f}" if score.std > 0 else f"{score.mean:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if math.isfinite(share) else "none"
