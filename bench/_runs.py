"""What the benchmarks that compare methods share: runs of the product, and how they are shown."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def product(log: Path, *arguments: str, threads: int | None = None) -> float:
    """Run a `distillm-ray` command with its output in `log`.

    Returns:
        The CPU seconds of its process and of the children that it waited for.

    Raises:
        SystemExit: the command failed.
    """
    command = [sys.executable, "-m", "distillm_ray.cli", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: see {log}")
    return usage.ru_utime + usage.ru_stime


def once(done: Path) -> Iterator[None]:
    """The block of a for-loop runs unless `done` exists; afterwards it does."""
    if not done.exists():
        yield
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation; the value alone where there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def draw_quality(
    by_method: dict[str, list[tuple[float, float]]],
    lines: dict[str, float],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
) -> None:
    """Quality against cost: a point a run `(cost, quality)`, a name at each method's mean."""
    figure = Figure(figsize=(8, 5), dpi=120)
    ax = figure.add_subplot()
    for method, points in by_method.items():
        costs, scores = zip(*points, strict=True)
        ax.scatter(costs, scores, s=18)
        at = (statistics.fmean(costs), statistics.fmean(scores))
        ax.annotate(method, at, textcoords="offset points", xytext=(6, 4))
    for style, (label, value) in zip((":", "--"), lines.items(), strict=False):
        ax.axhline(value, color="black", linestyle=style, linewidth=1, label=label)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.legend()
    figure.tight_layout()
    figure.savefig(path)
