"""Rows that cannot be used: where they stand, why, and whether the run goes on without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distillm_ray.config import DataConfig
from distillm_ray.data.rows import RowProblemKind

NUM_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RowProblem:
    """One row that is not used, and why."""

    position: str  # FILE:LINE
    kind: RowProblemKind
    reason: str

    def __str__(self) -> str:
        """`FILE:LINE: reason`."""
        return f"{self.position}: {self.reason}"


def refused(problems: Sequence[RowProblem], config: DataConfig) -> list[RowProblem]:
    """Those that end the run, by `data.bad_rows` and `data.long_rows`."""
    return [
        problem
        for problem in problems
        if (config.long_rows if problem.kind == "long" else config.bad_rows) == "fail"
    ]


def listed(problems: Sequence[RowProblem]) -> list[str]:
    """A line for each of the first problems, and the number of the others."""
    lines = [str(problem) for problem in problems[:NUM_SHOWN]]
    if len(problems) > len(lines):
        lines.append(f"and {len(problems) - len(lines)} more")
    return lines


def remedy(problems: Sequence[RowProblem]) -> str:
    """The overrides that leave these rows out."""
    keys = sorted({"long_rows" if one.kind == "long" else "bad_rows" for one in problems})
    return " and ".join(f"data.{key}=skip" for key in keys)
