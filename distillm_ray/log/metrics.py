"""The run's log: `metrics.jsonl` (see records.py) and TensorBoard, written while the run goes on.

A resumed run repeats the steps after its checkpoint. The lines of their first attempt stay in the
file, marked `"superseded": true`: the objects without that mark describe the run as it is, and the
marked ones show what the crash cost. Starts, events and costs are never marked, because they did
happen.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillm_ray.errors import RunDirectoryError
from distillm_ray.files import write_atomically
from distillm_ray.log.records import (
    REWOUND,
    UNKNOWN_STEP,
    EventRecord,
    Record,
    StartRecord,
    StepRecord,
    from_json,
    to_json,
)
from distillm_ray.log.tensorboard import scalars, texts
from distillm_ray.log.totals import Totals

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_TAIL_LENGTH = 4096  # newest records kept in memory for a live view
_NEVER_SUPERSEDED = ("start", "event", "cost")


class MetricsLog:
    """Appends records to a run directory. Only one writer at a time.

    Args:
        directory: the run directory; created if missing.
        resume_step: the checkpoint's step. Records of later steps are marked superseded. None
            starts the run from the beginning and supersedes every record in the file.
        commit, command: of this attempt; shown in the figures.
        export: called with every record that is added, stamped.
        clock: returns seconds since the epoch; tests replace it.

    Raises:
        RunDirectoryError: a line other than the last is not a record.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume_step: int | None = None,
        commit: str = "",
        command: str = "",
        tensorboard: bool = True,
        export: Callable[[Record], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE_NAME
        self._tensorboard_path = directory / TENSORBOARD_FOLDER if tensorboard else None
        self._export = export
        self._clock = clock
        self._tail: deque[Record] = deque(maxlen=_TAIL_LENGTH)
        self._num_added = 0
        self._open(-1 if resume_step is None else resume_step)
        self.add(
            StartRecord(
                step=resume_step or 0,
                resumed=resume_step is not None,
                commit=commit,
                command=command,
            )
        )

    def add(self, record: Record) -> None:
        """Stamp a record with the time and append it; it is in the file on return."""
        if record.time == 0.0:
            record = dataclasses.replace(record, time=self._clock())
        if record.step == UNKNOWN_STEP:
            record = dataclasses.replace(record, step=self._totals.last_step)
        self._file.write(to_json(record) + "\n")
        self._tail.append(record)
        self._num_added += 1
        self._totals = self._totals.plus(record)
        if self._export is not None:
            self._export(record)
        if self._writer is not None:
            for name, value in scalars(record, self._totals):
                self._writer.add_scalar(name, value, record.step, walltime=record.time)
            for name, text in texts(record):
                self._writer.add_text(name, text, record.step, walltime=record.time)

    def rewind(self, step: int) -> None:
        """Supersede the records after `step`: the learners restarted from that checkpoint."""
        self.close()
        self._open(step)
        self.add(EventRecord(step=step, name=REWOUND, detail="learners restarted"))

    def since(self, position: int) -> tuple[list[Record], int]:
        """Records added by this process after `position`, and the position for the next call.

        A reader that starts at 0 gets every record, unless more than 4096 were added between two
        calls: then it gets the newest 4096.
        """
        missed = min(self._num_added - position, len(self._tail))
        newest = list(self._tail)[len(self._tail) - missed :] if missed > 0 else []
        return newest, self._num_added

    def close(self) -> None:
        """Flush everything; `add` must not be called afterwards."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _open(self, resume_step: int) -> None:
        _supersede(self.path, resume_step)
        self._totals = Totals.of(read_records(self.path))
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._writer = None
        if self._tensorboard_path is not None:
            # Imported here because it imports torch, which readers of a log do not need.
            from tensorboardX import SummaryWriter  # noqa: PLC0415

            self._writer = SummaryWriter(
                str(self._tensorboard_path),
                purge_step=resume_step + 1,
                # The rest of the file name is in whole seconds; a rewind within the same second
                # would overwrite the file.
                filename_suffix=f".{time.time_ns()}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFile:
    """The content of a log, in file order."""

    records: tuple[Record, ...]  # describe the run as it is
    superseded: tuple[Record, ...]  # lost to a restart
    wall_seconds: float  # of all attempts: lost steps included, pauses between attempts not

    @property
    def superseded_steps(self) -> int:
        """Steps that were computed and lost to a restart."""
        return sum(isinstance(record, StepRecord) for record in self.superseded)


def read_log(path: Path) -> LogFile:
    """Read a log, in one pass; a missing file has no records.

    An incomplete last line (after a crash, or while a run writes it) is ignored.

    Raises:
        RunDirectoryError: another line is not a record.
    """
    records: list[Record] = []
    superseded: list[Record] = []
    seconds, previous = 0.0, math.nan
    for value in _objects(path):
        record = from_json(value)
        (superseded if value.get("superseded", False) else records).append(record)
        if isinstance(record, StartRecord):
            seconds = seconds if record.resumed else 0.0
        else:
            seconds += record.time - previous
        previous = record.time
    return LogFile(records=tuple(records), superseded=tuple(superseded), wall_seconds=seconds)


def read_records(path: Path) -> list[Record]:
    """The records that describe the run as it is; see `read_log`."""
    return [from_json(value) for value in _objects(path) if not value.get("superseded", False)]


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The lines one by one: a log may be larger than memory should hold twice."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError as error:
                if b"\n" not in file.read():  # only its line break reached the disk before a crash
                    return
                raise RunDirectoryError(
                    f"{path}, line {number}: not a JSON object: the log was edited or damaged;"
                    " move it away to start a new one"
                ) from error
            if not isinstance(value, dict) or "kind" not in value:
                raise RunDirectoryError(f"{path}, line {number}: expected an object with a `kind`")
            yield value


def _supersede(path: Path, resume_step: int) -> None:
    """Mark records after `resume_step` and drop an incomplete last line, atomically."""
    if not path.is_file():
        return
    objects = list(_objects(path))
    for value in objects:
        if value["kind"] not in _NEVER_SUPERSEDED and value["step"] > resume_step:
            value["superseded"] = True
    text = "".join(
        json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n" for value in objects
    )
    if text.encode() != path.read_bytes():
        write_atomically(path, text.encode())
