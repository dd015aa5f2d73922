"""The responses that an unfinished `distillm-ray generate` has so far, in a file beside its output.

    OUTPUT.partial    line 1: the settings that the responses depend on
                      then a line for each response, in the order in which they ended
    OUTPUT            the rows in the order of the prompts; appears complete when all have ended

A process may be killed at any moment. Whole lines stay valid; a line that was cut off, or damaged
by a power failure, is left out, and its prompt is responded to again. Responses without a row are
kept too, since they cost as much as the others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from distillm_ray.data.response_rows import ResponseCounts, ResponseRow
from distillm_ray.directory_lock import try_lock
from distillm_ray.errors import DataError
from distillm_ray.files import new_file

_SYNC_INTERVAL_S = 10.0  # what a power failure may cost; a killed process loses nothing written


def partial_path(output: Path) -> Path:
    """Where the responses for `output` are kept until it is complete.

    No data file has this extension, so it is never trained on.
    """
    return output.with_name(f"{output.name}.partial")


class PartialResponses:
    """The open file. `held` opens it; one process holds it at a time."""

    def __init__(
        self,
        output: Path,
        file: BinaryIO,
        settings: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = partial_path(output)
        self._output = output
        self._file = file
        self._clock = clock
        self._synced_at = clock()
        self._starts: dict[str, int] = {}  # where each prompt's line begins
        self.num_damaged = 0  # lines that are left out, besides one that was cut off
        self._read(settings)

    @property
    def done(self) -> Set[str]:
        """Ids of the prompts that have a response, those to come included."""
        return self._starts.keys()

    def add(self, rows: Sequence[ResponseRow]) -> None:
        """Append responses; they survive the end of this process when this returns."""
        for row in rows:
            self._starts[row.prompt_id] = self._file.tell()
            self._write(dataclasses.asdict(row))
        self._file.flush()
        if self._clock() - self._synced_at >= _SYNC_INTERVAL_S:
            os.fsync(self._file.fileno())
            self._synced_at = self._clock()

    def finish(self, prompt_ids: Sequence[str], *, keep_truncated: bool) -> ResponseCounts:
        """Write the output, in the order of these prompts, and remove the partial file.

        Without a row to write, the output is not made and the partial file stays: another
        `keep_truncated` may find some.
        """
        counts = ResponseCounts()
        if not any(
            counts.add(row, keep_truncated=keep_truncated) for row in self._rows(prompt_ids)
        ):
            return counts
        counts = ResponseCounts()
        with new_file(self._output) as output:
            for found in self._rows(prompt_ids):
                if counts.add(found, keep_truncated=keep_truncated):
                    output.write(_line(found.row))
        self.path.unlink()
        return counts

    def _read(self, settings: Mapping[str, Any]) -> None:
        """Find the lines of an earlier process, or begin the file.

        Raises:
            DataError: they are responses of other settings, or the file is something else.
        """
        file, path = self._file, self.path
        file.seek(0)
        if not (head := file.readline()).endswith(b"\n"):
            file.seek(0)
            file.truncate()
            self._write({"settings": settings})
            file.flush()
            return
        before = _parsed(head).get("settings")
        if not isinstance(before, dict):
            raise DataError(
                f"--output: {path} is in the way, and was not written by `distillm-ray generate`;"
                " remove it, or name another output"
            )
        if changes := list(_changes(before, json.loads(json.dumps(settings)))):
            raise DataError(
                f"--output: {path} has responses of other settings: {'; '.join(changes)}; give the"
                " same ones to go on, or remove the file to start again"
            )
        start = file.tell()
        while (line := file.readline()).endswith(b"\n"):
            prompt_id = _parsed(line).get("prompt_id")
            if isinstance(prompt_id, str):
                self._starts[prompt_id] = start
            else:
                self.num_damaged += 1
            start = file.tell()
        file.seek(start)
        file.truncate()

    def _rows(self, prompt_ids: Sequence[str]) -> Iterator[ResponseRow]:
        for prompt_id in prompt_ids:
            self._file.seek(self._starts[prompt_id])
            yield ResponseRow(**json.loads(self._file.readline()))

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(_line(content))


@contextmanager
def held(output: Path, settings: Mapping[str, Any]) -> Iterator[PartialResponses]:
    """Open the partial file of an output, and go on with what is in it.

    Args:
        settings: all that the responses depend on, in values of JSON.

    Raises:
        DataError: another process of this machine writes it, or as in `PartialResponses`.
    """
    path = partial_path(output)
    with path.open("a+b") as file:
        if not try_lock(file.fileno()):
            raise DataError(
                f"--output: another process is writing {path}; wait until it ends, or name another"
                " output"
            )
        yield PartialResponses(output, file, settings)


def _line(content: Mapping[str, Any] | None) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """The object of a line; empty if it is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The settings that differ, with both values."""
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old!r} and is {new!r}"
