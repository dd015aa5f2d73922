"""The report of a run: `summary.json`, figures, `samples.md`, and the table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distillm_ray.errors import RunDirectoryError
from distillm_ray.evaluation.results import (
    EVALUATION_FILE,
    STUDENT_AFTER,
    STUDENT_BEFORE,
    TEACHER,
    ComparedSample,
    Evaluation,
    ModelScores,
    read_evaluation,
)
from distillm_ray.log.costs import WORKERS
from distillm_ray.log.metrics import FILE_NAME
from distillm_ray.log.timeline import TIMELINE_FILE
from distillm_ray.report.console import duration, percent
from distillm_ray.report.plots import draw_all, draw_overview
from distillm_ray.report.scores_table import scores_table
from distillm_ray.report.summary import SUMMARY_FILE, Run, Summary, read_run, summarize
from distillm_ray.run_directory import MODEL_FOLDER

SAMPLES_FILE = "samples.md"
PLOTS_FOLDER = "plots"


def write_report(directory: Path, *, compare: Sequence[Path] = ()) -> RenderableType:
    """Write `summary.json`, `plots/` and (after an evaluation) `samples.md`; return the table.

    Args:
        directory: the run directory.
        compare: other run directories; the scores of their trained students become rows.

    Raises:
        RunDirectoryError: `directory` is not a run, or one of `compare` has no evaluation.
    """
    run = read_run(directory)
    others: dict[str, ModelScores] = {}
    for other in compare:
        evaluation = read_evaluation(other)
        if evaluation is None or STUDENT_AFTER not in evaluation.models:
            raise RunDirectoryError(
                f"{other} holds no {EVALUATION_FILE} with a trained student to compare with:"
                " only a completed run with evaluation.at_end has one"
            )
        others[f"student after ({other.name})"] = evaluation.models[STUDENT_AFTER]
    summary = summarize(run)
    summary.write(directory)
    draw_overview(
        run.records,
        directory / PLOTS_FOLDER / "overview.png",
        title=summary.command or directory.name,
        subtitle=f"commit {summary.commit}" if summary.commit else "",
    )
    draw_all(run.records, directory / PLOTS_FOLDER)
    if run.evaluation is not None and run.evaluation.samples:
        write_samples(directory / SAMPLES_FILE, run.evaluation.samples)
    return render_report(run, summary, others)


def write_samples(path: Path, samples: Sequence[ComparedSample]) -> None:
    """Write prompts, references and both responses as Markdown."""
    parts = ["# Responses to held-out prompts before and after training\n"]
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
    """The table at the end of a run: scores, seconds by role, and where the files are."""
    parts: list[RenderableType] = []
    if run.evaluation is not None:
        parts.append(_scores(run.evaluation, others or {}))
    parts.append(_seconds(summary))
    if summary.totals.training_seconds:
        parts.append(_costs(summary))
    parts.append(_places(run.directory))
    parts.extend(Text(f"note: {note}", style="yellow") for note in summary.notes)
    return Group(*parts)


def _scores(evaluation: Evaluation, others: Mapping[str, ModelScores]) -> Table:
    num_seeds = len(evaluation.seeds)
    seeds = f", {num_seeds} seed{'s' if num_seeds > 1 else ''}" if num_seeds else ""
    title = f"{evaluation.num_prompts} held-out prompts{seeds}"
    order = (STUDENT_BEFORE, STUDENT_AFTER, TEACHER)
    rows = {name: evaluation.models[name] for name in order if name in evaluation.models}
    rows |= {name: scores for name, scores in evaluation.models.items() if name not in order}
    return scores_table(rows | dict(others), title=title if evaluation.num_prompts else None)


def _seconds(summary: Summary) -> Table:
    totals = summary.totals
    mix, work = totals.mix, totals.work
    table = Table(title=f"{summary.steps} steps, {summary.status}", title_justify="left")
    for name in ("seconds spent", "", "work"):
        table.add_column(name, justify="right" if name == "" else "left")
    generated = f"{work.generated_tokens:,} tokens in {work.generated_sequences:,} responses"
    if work.probe_sequences:
        generated += (
            f"\nand {work.probe_tokens:,} in {work.probe_sequences:,} responses to held-out prompts"
        )
    scored = "no teacher targets"
    if totals.has_targets:
        scored = (
            f"{work.scored_tokens:,} tokens in {work.scored_sequences:,} sequences\n"
            f"target reuse: {percent(summary.target_reuse_sequences)} of the sequences,"
            f" {percent(summary.target_reuse_tokens)} of the tokens trained on"
            + (" with targets" if totals.untargeted_sequences else "")
        )
        if work.library_sequences:
            scored += (
                f"\nfrom the library: {work.library_tokens:,} tokens in"
                f" {work.library_sequences:,} sequences, which the teacher once computed in"
                f" {summary.teacher_seconds_saved:.1f} s"
            )
    learned = (
        f"{totals.tokens:,} tokens: {mix.fresh:,} fresh, {mix.replay:,} replayed,"
        f" {mix.dataset:,} data-set sequences"
        + (f", {mix.corpus:,} of the corpus" if mix.corpus else "")
    )
    published = f"{totals.publishes} versions published"
    for name, seconds, done in (
        ("generating", work.generate_seconds, generated),
        ("scoring", work.score_seconds, scored),
        ("learning", totals.learn_seconds, learned),
        ("waiting (learner)", totals.wait_seconds, ""),
        ("publishing", totals.publish_seconds, published),
        ("validating", totals.validate_seconds, ""),
        ("checkpointing", totals.checkpoint_seconds, ""),
        ("loading new weights", work.sync_seconds, ""),
    ):
        table.add_row(name, f"{seconds:.1f}", done)
    table.add_section()
    wall = summary.wall_seconds
    table.add_row("wall-clock", f"{wall:.1f}", f"{duration(wall)} in all")
    return table


def _costs(summary: Summary) -> Table:
    """What each role used while the learners trained."""
    totals = summary.totals
    wall, costs = totals.training_seconds, totals.training_costs
    used = sum(cost.cpu_seconds for cost in costs.values())
    devices = sum(cost.gpu_seconds for cost in costs.values())
    all_phases = sum(cost.cpu_seconds for cost in totals.costs.values())
    a_step = f", {used / totals.steps:.2f} a step" if totals.steps else ""
    table = Table(
        title=f"where time and cost went in {duration(wall)} of training",
        caption=f"{used:,.1f} CPU-seconds in training{a_step}; {all_phases:,.1f} in all phases",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("role")
    numbers = ("processes", "CPU-seconds", *(("GPU-seconds",) if devices else ()))
    for name in (*numbers, "busy", "queue", "tokens", "tokens/s", "tokens/CPU-s"):
        table.add_column(name, justify="right")
    for role, cost in costs.items():
        row = [f"{cost.seconds / wall:.0f}", f"{cost.cpu_seconds:,.1f}"]
        if devices:
            row.append(f"{cost.gpu_seconds:,.1f}")
        if role in WORKERS:
            row += [
                percent(cost.busy_share),
                "" if role == "learner" else f"{cost.queue_seconds / wall:.1f}",
                f"{cost.tokens:,}",
                f"{cost.tokens / wall:,.0f}",
                f"{cost.tokens_per_cpu_second:,.0f}" if cost.cpu_seconds else "-",
            ]
        table.add_row(role.replace("_", " "), *row)
    return table


def _places(directory: Path) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, place in (
        ("model", directory / MODEL_FOLDER),
        ("log", directory / FILE_NAME),
        ("plots", directory / PLOTS_FOLDER),
        ("samples", directory / SAMPLES_FILE),
        ("summary", directory / SUMMARY_FILE),
        ("timeline", directory / TIMELINE_FILE),
    ):
        if place.exists():
            table.add_row(name, Text(str(place)))
    return table
