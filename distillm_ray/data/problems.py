"""Rows that cannot be used: where they stand, why, and whether the run goes on without them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from distillm_ray.config import DataConfig
from distillm_ray.data.rows import NO_RESPONSE, RowProblemKind

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


class Problems:
    """The problems of a list of files: counted, with the first of them for messages."""

    def __init__(self, config: DataConfig) -> None:
        """`data.bad_rows` and `data.long_rows` decide which of them end the run."""
        self._config = config
        self._refused: list[RowProblem] = []  # the first
        self.first: list[RowProblem] = []
        self.counts: Counter[RowProblemKind] = Counter()
        self.lacks_response = False  # a row that ends the run

    def add(self, problem: RowProblem) -> None:
        """Add one, in the order of files and rows."""
        self.counts[problem.kind] += 1
        self.first += [problem] if len(self.first) < NUM_SHOWN else []
        if self._ends_run(problem.kind):
            self._refused += [problem] if len(self._refused) < NUM_SHOWN else []
            self.lacks_response |= NO_RESPONSE in problem.reason

    @property
    def total(self) -> int:
        """How many there are."""
        return self.counts.total()

    @property
    def refused_kinds(self) -> list[RowProblemKind]:
        """The kinds that end the run, of those that occurred."""
        return [kind for kind in self.counts if self._ends_run(kind)]

    def refusal(self) -> list[str]:
        """A line for each of the first that end the run, and the number of the others."""
        lines = [str(problem) for problem in self._refused]
        more = sum(self.counts[kind] for kind in self.refused_kinds) - len(lines)
        return [*lines, f"and {more} more"] if more else lines

    def remedy(self) -> str:
        """The overrides that leave out the rows that end the run."""
        keys = sorted(
            {"long_rows" if kind == "long" else "bad_rows" for kind in self.refused_kinds}
        )
        return " and ".join(f"data.{key}=skip" for key in keys)

    def _ends_run(self, kind: RowProblemKind) -> bool:
        return (self._config.long_rows if kind == "long" else self._config.bad_rows) == "fail"
