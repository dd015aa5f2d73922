"""The run's log: `metrics.jsonl` and TensorBoard, and what a live view asks of them.

A resumed run repeats the steps after its checkpoint. Their first attempt stays in the file, marked
`"superseded": true`, so that every object without that mark belongs to the run as it is, and the
cost of the crash can still be read. Starts and events are never marked: they happened.
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
    UNKNOWN_STEP,
    EventRecord,
    PublishRecord,
    Record,
    StartRecord,
    StepRecord,
    from_json,
    to_json,
)
from distillm_ray.log.tensorboard import scalars, texts

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_TAIL_LENGTH = 4096
_NEVER_SUPERSEDED = ("start", "event")


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the steps of a run that still count; a pool's seconds are those with a call."""

    steps: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    fresh: int = 0
    replay: int = 0
    dataset: int = 0
    publishes: int = 0
    generated_sequences: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    target_hits: int = 0
    target_misses: int = 0
    lost: int = 0
    late: int = 0
    infinite_tokens: int = 0
    generate_seconds: float = 0.0
    score_seconds: float = 0.0
    learn_seconds: float = 0.0
    wait_seconds: float = 0.0
    sync_seconds: float = 0.0

    def plus(self, record: Record) -> Totals:
        """The sums with one more record."""
        match record:
            case PublishRecord():
                return dataclasses.replace(self, publishes=self.publishes + 1)
            case StepRecord(work=work, mix=mix):
                return Totals(
                    steps=self.steps + 1,
                    skipped_steps=self.skipped_steps + record.skipped,
                    tokens=self.tokens + record.tokens,
                    fresh=self.fresh + mix.fresh,
                    replay=self.replay + mix.replay,
                    dataset=self.dataset + mix.dataset,
                    publishes=self.publishes,
                    generated_sequences=self.generated_sequences + work.generated_sequences,
                    generated_tokens=self.generated_tokens + work.generated_tokens,
                    scored_tokens=self.scored_tokens + work.scored_tokens,
                    target_hits=self.target_hits + work.target_hits,
                    target_misses=self.target_misses + work.target_misses,
                    lost=self.lost + work.lost,
                    late=self.late + work.late,
                    infinite_tokens=self.infinite_tokens + record.infinite_tokens,
                    generate_seconds=self.generate_seconds + work.generate_seconds,
                    score_seconds=self.score_seconds + work.score_seconds,
                    learn_seconds=self.learn_seconds + record.learn_seconds,
                    wait_seconds=self.wait_seconds + record.wait_seconds,
                    sync_seconds=self.sync_seconds + work.sync_seconds,
                )
            case _:
                return self


class MetricsLog:
    """Appends records to a run directory. One writer at a time.

    Args:
        directory: the run directory; made if missing.
        resume_step: the checkpoint's step. Records of later steps are marked superseded; None is a
            run from the beginning, which supersedes everything that is there.
        commit, command: of this attempt; the figures carry them.
        clock: seconds since the epoch, for tests.

    Raises:
        RunDirectoryError: a line other than the last is no record.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume_step: int | None = None,
        commit: str = "",
        command: str = "",
        tensorboard: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE_NAME
        self._tensorboard_path = directory / TENSORBOARD_FOLDER if tensorboard else None
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
        """Write a record down, with the time of day; it is in the file when this returns."""
        if record.time == 0.0:
            record = dataclasses.replace(record, time=self._clock())
        if record.step == UNKNOWN_STEP:
            newest = self.latest("step")
            record = dataclasses.replace(record, step=newest.step if newest is not None else 0)
        self._file.write(to_json(record) + "\n")
        self._remember(record)
        if self._writer is not None:
            for name, value in scalars(record):
                self._writer.add_scalar(name, value, record.step, walltime=record.time)
            for name, text in texts(record):
                self._writer.add_text(name, text, record.step, walltime=record.time)

    def rewind(self, step: int) -> None:
        """The learners went back to the checkpoint of `step`: what came after it is superseded."""
        self.close()
        self._open(step)
        self.add(EventRecord(step=step, name="rewound", detail="learners restarted"))

    def latest(self, kind: str) -> Record | None:
        """The newest record of a kind that still counts."""
        return self._latest.get(kind)

    @property
    def totals(self) -> Totals:
        """Sums over the records that still count."""
        return self._totals

    def since(self, position: int) -> tuple[list[Record], int]:
        """Records added by this process after `position`, and the position to ask for next.

        A reader that starts at 0 and asks often sees every one; a slow reader sees the newest 4096.
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
        self._latest: dict[str, Record] = {}
        self._totals = Totals()
        _supersede(self.path, resume_step)
        for record in read_records(self.path):
            self._latest[record.kind] = record
            self._totals = self._totals.plus(record)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._writer = None
        if self._tensorboard_path is not None:
            # It imports torch: seconds that who reads a log shall not wait.
            from tensorboardX import SummaryWriter  # noqa: PLC0415

            purge_step = max(resume_step, -1) + 1
            self._writer = SummaryWriter(
                str(self._tensorboard_path),
                purge_step=purge_step,
                # the rest of the file name has whole seconds: a rewind would overwrite the file
                filename_suffix=f".{time.time_ns()}",
            )

    def _remember(self, record: Record) -> None:
        self._tail.append(record)
        self._num_added += 1
        self._latest[record.kind] = record
        self._totals = self._totals.plus(record)


def read_records(path: Path) -> list[Record]:
    """The records of a log that still count, in file order; a missing file has none.

    A last line that is cut off (a crash, or a run that is writing it now) is left out.

    Raises:
        RunDirectoryError: another line is no record.
    """
    return [from_json(value) for value in _objects(path) if not value.get("superseded", False)]


def count_superseded_steps(path: Path) -> int:
    """Steps that were computed and lost again to a restart."""
    return sum(
        value.get("superseded", False) and value["kind"] == "step" for value in _objects(path)
    )


def wall_seconds(path: Path) -> float:
    """Wall-clock of the run over all its attempts, lost steps included, pauses between left out."""
    total, previous = 0.0, math.nan
    for value in _objects(path):
        if value["kind"] == "start":
            total = total if value["resumed"] else 0.0
        else:
            total += value["time"] - previous
        previous = value["time"]
    return total


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # what follows the last line break: nothing, or a torn line
            return
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines) - 1:  # a line break made it to disk, the bytes before did not
                return
            raise RunDirectoryError(
                f"{path}, line {number}: no JSON object; the log was edited or the disk damaged"
                " it: move it away to start a new one"
            ) from error
        if not isinstance(value, dict) or "kind" not in value:
            raise RunDirectoryError(f"{path}, line {number}: an object with a `kind` is expected")
        yield value


def _supersede(path: Path, resume_step: int) -> None:
    """Mark what follows `resume_step` and drop a torn last line, in one atomic replacement."""
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
