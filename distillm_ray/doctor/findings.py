"""A line of the doctor's report, and the table of all of them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

Status: TypeAlias = Literal["ok", "warn", "missing"]

GIB = 2**30
_STATUS_STYLES = {"ok": "green", "warn": "yellow", "missing": "bold red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status  # missing: training cannot run; warn: it can, with a drawback
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Finding:
    """Nothing to do."""
    return Finding(name=name, status="ok", detail=detail)


def warn(name: str, detail: str, remedy: str) -> Finding:
    """Training can run, with a drawback."""
    return Finding(name=name, status="warn", detail=detail, remedy=remedy)


def missing(name: str, detail: str, remedy: str) -> Finding:
    """Training cannot run."""
    return Finding(name=name, status="missing", detail=detail, remedy=remedy)


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 if training cannot run, else 0."""
    return int(any(finding.status == "missing" for finding in findings))


def render(findings: Sequence[Finding]) -> RenderableType:
    """Return the findings as a table."""
    table = Table(title=f"{platform.system()} {platform.machine()}", title_justify="left")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(
            Text(finding.status, _STATUS_STYLES[finding.status]),
            Text(finding.name),
            Text(finding.detail),
            Text(finding.remedy),
        )
    return table
