"""Figures of a run, drawn from its records.

The colors are from the Okabe-Ito palette, which stays distinguishable under color blindness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distillm_ray.log.records import (
    Record,
    StepRecord,
    ValidationRecord,
    is_from_checkpoint,
)

BLUE, ORANGE, GREEN, RED, SKY, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#56b4e9",
    "#9a9a9a",
)
_STYLE: dict[Any, Any] = {  # Any: matplotlib types each key of its settings
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}
_SMOOTHING_STEPS = 10
_Corner: TypeAlias = Literal["upper left", "upper right"]


def draw_overview(records: Sequence[Record], path: Path, *, title: str, subtitle: str) -> None:
    """Draw loss, phi, mix and buffer into one picture, 1200 pixels wide."""
    panels = (draw_loss, draw_phi, draw_mix, draw_buffer)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12, 7.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2).ravel()
        for panel, ax in zip(panels, axes, strict=True):
            panel(ax, records)
        lines = [part for part in (title, subtitle) if part]
        if lines:
            figure.suptitle("\n".join(lines), fontsize=11, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)


def draw_all(records: Sequence[Record], directory: Path) -> tuple[Path, ...]:
    """Draw one picture for each panel; returns their paths."""
    panels: dict[str, Callable[[Axes, Sequence[Record]], None]] = {
        "loss": draw_loss,
        "phi": draw_phi,
        "mix": draw_mix,
        "age": draw_age,
        "buffer": draw_buffer,
        "actors": draw_actors,
        "seconds": draw_seconds,
        "work": draw_work,
    }
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(_STYLE):
        for name, panel in panels.items():
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            FigureCanvasAgg(figure)
            panel(figure.subplots(), records)
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], dpi=120)
    return tuple(paths)


def draw_curves(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    path: Path,
    *,
    ylabel: str,
) -> None:
    """One panel for each x axis, one curve (x, y) for each name; best is lowest."""
    colors = (BLUE, ORANGE, GREEN, RED, SKY, GREY)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12, 7.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2).ravel()
        for ax, (xlabel, curves) in zip(axes, panels.items(), strict=True):
            for index, (name, (at, values)) in enumerate(curves.items()):
                style = ("-", "--", ":", "-.")[index // len(colors) % 4]
                color = colors[index % len(colors)]
                ax.plot(at, values, style, marker="o", markersize=3, color=color, label=name)
            ax.set_xlabel(xlabel)
            ax.set_ylabel(ylabel)
        axes[0].legend()
        figure.savefig(path, dpi=100)


def draw_loss(ax: Axes, records: Sequence[Record]) -> None:
    """Training loss by step with its running mean, and the validation loss."""
    steps, at = _steps(records)
    losses = np.array([record.loss for record in steps], dtype=float)
    ax.plot(at, losses, color=BLUE, alpha=0.25, linewidth=1)
    ax.plot(
        at,
        running_mean(losses, _SMOOTHING_STEPS),
        color=BLUE,
        label="training loss (left)",
    )
    names = dict.fromkeys(name for record in steps for name in record.loss_by_term)
    for name, style in zip(names, ("--", ":", "-.", "--", ":", "-."), strict=False):
        if len(names) > 1:
            of_term = [record.loss_by_term.get(name, math.nan) for record in steps]
            smooth = running_mean(of_term, _SMOOTHING_STEPS)
            ax.plot(at, smooth, style, color=SKY, linewidth=1, label=f"{name} (left)")
    ax.set_ylabel("training loss, nats a token", color=BLUE)
    if all(record.loss >= 0 for record in steps):  # policy gradients have losses below 0
        ax.set_ylim(bottom=0)
    held_out = [record for record in records if isinstance(record, ValidationRecord)]
    right = _right_axis(ax)
    right.plot(
        [record.step for record in held_out],
        [record.loss for record in held_out],
        color=RED,
        marker="o",
        markersize=4,
        label="validation loss (right)",
    )
    right.set_ylabel("validation loss, nats a token", color=RED)
    right.set_ylim(bottom=0)
    for index, record in enumerate(record for record in steps if record.skipped):
        label = "skipped step" if index == 0 else None
        ax.axvline(record.step, color="black", linestyle=":", linewidth=1, label=label)
    _legend_of_both(ax, right, "upper right")
    _finish(ax, "Loss", records)


def draw_phi(ax: Axes, records: Sequence[Record]) -> None:
    """The SGO probability, and the rollout rate: the share of slots that need a new response.

    Where a pool changed its size, the members of the pools are on the right.
    """
    steps, at = _steps(records)
    ax.step(
        at,
        [r.phi for r in steps],
        color=BLUE,
        where="post",
        label="phi: SGO probability",
    )
    ax.plot(at, [r.psi for r in steps], color=ORANGE, label="psi: rollout rate")
    ax.set_ylim(-0.02, 1.02)
    ax.set_ylabel("probability")
    if len({(r.actors.generators, r.actors.scorers) for r in steps}) > 1:
        right = _right_axis(ax)
        _draw_members(right, records, where=" (right)")
        _legend_of_both(ax, right, "upper right")
    else:
        ax.legend(loc="upper right")
    _finish(ax, "Schedule", records)


def draw_actors(ax: Axes, records: Sequence[Record]) -> None:
    """The members of the pools that worked, and those that waited for room or were loading."""
    steps, at = _steps(records)
    _draw_members(ax, records)
    starting = [r.actors.generators_starting + r.actors.scorers_starting for r in steps]
    ax.step(at, starting, color=GREY, where="post", linestyle="--", label="starting, of both")
    ax.legend(loc="upper right")
    _finish(ax, "Pools", records)


def _draw_members(ax: Axes, records: Sequence[Record], *, where: str = "") -> None:
    """Steps of the numbers of generators and scorers; `where` follows their names."""
    steps, at = _steps(records)
    for label, color, values in (
        ("generators", RED, [r.actors.generators for r in steps]),
        ("scorers", GREEN, [r.actors.scorers for r in steps]),
    ):
        ax.step(at, values, color=color, linewidth=1.2, where="post", label=f"{label}{where}")
    most = max((max(r.actors.generators, r.actors.scorers) for r in steps), default=0)
    ax.set_ylim(0, max(1.3 * most, 1))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("processes")


def draw_mix(ax: Axes, records: Sequence[Record]) -> None:
    """Share of the shelves in the slots of each batch, beside what the schedule asked for.

    What a corpus adds to every batch is left out: the schedule does not ask for it.
    """
    steps, at = _steps(records)
    shares = np.array([[r.mix.fresh, r.mix.replay, r.mix.dataset] for r in steps], dtype=float)
    shares = shares.reshape(-1, 3)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
    ax.stackplot(
        at,
        *shares.T,
        labels=("fresh", "replay", "data set"),
        colors=(ORANGE, SKY, "#d0d0d0"),
        step="mid",
    )
    ax.step(at, [r.phi for r in steps], color="black", linewidth=1.2, where="mid", label="phi")
    ax.plot(at, [r.psi for r in steps], color="black", linewidth=1.2, linestyle="--", label="psi")
    ax.set_ylim(0, 1)
    has_corpus = any(r.mix.corpus for r in steps)
    ax.set_ylabel(f"share of the batch{' without the corpus' if has_corpus else ''}")
    ax.legend(loc="upper right", ncols=5, frameon=True, framealpha=0.85, edgecolor="none")
    ax.grid(visible=False)
    _finish(ax, "Mix drawn", records)


def draw_age(ax: Axes, records: Sequence[Record]) -> None:
    """Age of the sequences trained on, in optimizer steps."""
    steps, at = _steps(records)
    worst = [r.fresh_age_max if r.mix.fresh else math.nan for r in steps]
    ax.plot(at, worst, color=GREY, linestyle="none", marker=".", label="fresh: oldest")
    ax.plot(
        at,
        running_mean([r.fresh_age_mean for r in steps], _SMOOTHING_STEPS),
        color=ORANGE,
        label="fresh: mean",
    )
    ax.plot(
        at,
        running_mean([r.replay_age_mean for r in steps], _SMOOTHING_STEPS),
        color=SKY,
        label="replay: mean",
    )
    ax.set_ylim(bottom=-0.1)
    ax.set_ylabel("steps since generation began")
    ax.legend(loc="upper left")
    _finish(ax, "Age of samples", records)


def draw_buffer(ax: Axes, records: Sequence[Record]) -> None:
    """Size of the replay shelf, and the demanded sequences in flight and finished."""
    steps, at = _steps(records)
    ax.fill_between(at, [r.buffer.replay for r in steps], color=SKY, alpha=0.35, linewidth=0)
    ax.plot(at, [r.buffer.replay for r in steps], color=SKY, label="replay shelf (left)")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("sequences to replay")
    right = _right_axis(ax)
    for label, color, values in (
        ("in flight (right)", GREEN, [r.buffer.in_flight for r in steps]),
        ("fresh, finished (right)", ORANGE, [r.buffer.fresh for r in steps]),
    ):
        right.plot(at, values, color=color, linewidth=1, alpha=0.9, label=label)
    highest = max((r.buffer.in_flight + r.buffer.fresh for r in steps), default=0)
    right.set_ylim(0, max(2 * highest, 1))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_ylabel("demanded sequences")
    _legend_of_both(ax, right, "upper left")
    _finish(ax, "Replay buffer", records)


def draw_seconds(ax: Axes, records: Sequence[Record]) -> None:
    """Busy seconds of each role. Roles work in parallel, so the sum exceeds a step's seconds."""
    steps, at = _steps(records)
    for label, color, values in (
        ("learning", BLUE, [r.learn_seconds for r in steps]),
        ("learner waiting", RED, [r.wait_seconds for r in steps]),
        ("generating", ORANGE, [r.work.generate_seconds for r in steps]),
        ("scoring", GREEN, [r.work.score_seconds for r in steps]),
    ):
        ax.plot(at, values, color=color, alpha=0.2, linewidth=1)
        ax.plot(at, running_mean(values, _SMOOTHING_STEPS), color=color, label=label)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("seconds a step, by role")
    ax.legend(loc="upper right")
    _finish(ax, "Seconds by role", records)


def draw_work(ax: Axes, records: Sequence[Record]) -> None:
    """Tokens trained on, scored and generated so far.

    The gap between the first two is the work that target reuse saves.
    """
    steps, at = _steps(records)
    for label, color, values in (
        ("trained on", BLUE, [r.tokens for r in steps]),
        ("scored by the teacher", GREEN, [r.work.scored_tokens for r in steps]),
        ("generated", ORANGE, [r.work.generated_tokens for r in steps]),
    ):
        ax.plot(at, np.cumsum(values), color=color, label=label)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("tokens so far")
    ax.legend(loc="upper left")
    _finish(ax, "Work", records)


def running_mean(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """Mean of the finite ones among the last `width` values; NaN where there are none."""
    array = np.asarray(values, dtype=float)
    finite = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, len(array) + 1)
    starts = np.maximum(ends - width, 0)
    count = counts[ends] - counts[starts]
    return np.where(count > 0, (sums[ends] - sums[starts]) / np.maximum(count, 1), np.nan)


def _steps(records: Sequence[Record]) -> tuple[list[StepRecord], list[int]]:
    steps = [record for record in records if isinstance(record, StepRecord)]
    return steps, [record.step for record in steps]


def _right_axis(ax: Axes) -> Axes:
    right = ax.twinx()
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    return right


def _legend_of_both(ax: Axes, right: Axes, location: _Corner) -> None:
    handles = [*ax.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    right.legend(handles=handles, loc=location)


def _finish(ax: Axes, title: str, records: Sequence[Record]) -> None:
    """Title, step axis, and a thin line at each resume."""
    for record in records:
        if is_from_checkpoint(record):
            ax.axvline(record.step, color=GREY, linestyle="--", linewidth=0.8)
    ax.set_title(title)
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = max((record.step for record in records), default=0)
    ax.set_xlim(0, max(last, 1))
