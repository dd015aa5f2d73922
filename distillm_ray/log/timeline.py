"""What the roles of a run did when: `timeline.json`, for ui.perfetto.dev and chrome://tracing.

The file is a JSON array in the Trace Event Format, one event a line. A role is a process of the
picture, and what one of its actors does one after the other is a track, a thread:

    kind                                   event
    -----------------------------------    --------------------------------------------------------
    a slice of a track                     "X", complete: begin and duration
    a slice that may overlap others        "b" and "e": an asynchronous pair
    a number that changes                  "C", counter
    names of processes and tracks          "M", metadata
    an attempt starts                      "i", instant

Times are microseconds since the run's first attempt started, by the wall clock of the process that
reports them. Clocks of several nodes may differ.

The file holds at most `max_events` events, names aside: the first half of them and the newest half.
The first half is appended as it comes. From then on the newest half is written anew from time to
time. Where the run is killed, what is in the file stays; the array may then lack its end, which
the format allows.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from distillm_ray.log.costs import ROLES, Role

TIMELINE_FILE = "timeline.json"
MAX_PENDING = 20_000
"""Events that a process keeps until it sends them; the oldest of more are dropped."""

_RENEW_S = 30.0  # between two times that the newest half is written
_TITLES: dict[Role, str] = {
    "learner": "learners",
    "generator": "generators",
    "scorer": "scorers",
    "buffer": "replay buffer",
}


# ---- events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Something that took a while. Times are seconds since the epoch."""

    role: Role
    track: str
    name: str
    start: float
    end: float
    apart: bool = False  # it may overlap other slices of its track


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A number from a moment on, until the next one of this name."""

    role: Role
    name: str
    at: float
    value: int


Event: TypeAlias = Slice | Level


class Timeline:
    """Notes what a process does, until it is taken.

    Example:
        >>> timeline = Timeline(clock=iter([1.0, 2.5]).__next__)
        >>> with timeline.slice("learner", "rank 0", "step 1"):
        ...     pass
        >>> [event] = timeline.take()
        >>> event.name, event.start, event.end
        ('step 1', 1.0, 2.5)
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._pending: deque[Event] = deque(maxlen=MAX_PENDING)
        self._calls: Counter[str] = Counter()  # in progress, by track
        self._since: dict[str, float] = {}  # the first of them

    @contextmanager
    def slice(self, role: Role, track: str, name: str, *, apart: bool = False) -> Iterator[None]:
        """Note the block. Unless it is `apart`, it must not overlap another one of its track."""
        start = self._clock()
        try:
            yield
        finally:
            end = max(start, self._clock())
            self._pending.append(
                Slice(role=role, track=track, name=name, start=start, end=end, apart=apart)
            )

    @contextmanager
    def call(self, role: Role, track: str, name: str) -> Iterator[None]:
        """Note the block as one of the calls to a track.

        Their number is a counter, and the time with at least one of them is a slice.
        """
        self._change(role, track, 1)
        try:
            yield
        finally:
            end = self._change(role, track, -1)
            if not self._calls[track]:
                start = self._since[track]
                self._pending.append(
                    Slice(role=role, track=track, name=name, start=start, end=max(start, end))
                )

    @contextmanager
    def count(self, role: Role, name: str) -> Iterator[None]:
        """Note the block in a counter of those that run."""
        self._change(role, name, 1)
        try:
            yield
        finally:
            self._change(role, name, -1)

    def take(self) -> list[Event]:
        """What was noted since the last time. Another thread may note meanwhile."""
        return [self._pending.popleft() for _ in range(len(self._pending))]

    def _change(self, role: Role, track: str, by: int) -> float:
        now = self._clock()
        if not self._calls[track]:
            self._since[track] = now
        self._calls[track] += by
        self._pending.append(Level(role=role, name=track, at=now, value=self._calls[track]))
        return now


# ---- the file ------------------------------------------------------------------------------------


class TimelineFile:
    """Writes `timeline.json`. Only one writer at a time.

    Args:
        path: of the file. It is continued if `resumed`, else replaced.
        max_events: that it holds; 0 writes no file.
        started: of this attempt, in seconds since the epoch.
        attempt: what its start is called, such as "run started".
    """

    def __init__(
        self,
        path: Path,
        *,
        max_events: int,
        started: float,
        attempt: str,
        resumed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._max_head = max_events // 2
        self._num_head = 0
        self._newest: deque[str] = deque(maxlen=max_events - self._max_head)
        self._names: list[str] = []  # metadata; of each process and track once
        self._tracks: dict[tuple[str, str], int] = {}
        self._num_pairs = 0
        self._renewed_at = clock()
        self._run_started = started
        self._is_empty = True
        self._head_end = 1  # bytes
        self._file: BinaryIO | None = None
        before = _read(path) if resumed else []
        if not max_events:
            path.unlink(missing_ok=True)
            return
        self._file = path.open("wb")
        self._file.write(b"[")
        for event in before:
            self._take_over(event)
        args = {"unix_seconds": started}
        fields = {"ph": "i", "s": "g", "name": attempt, "args": args}
        self._append([self._json("driver", "driver", at=started, **fields)])
        self._renew()

    def add(self, events: Sequence[Event]) -> None:
        """Write events, or keep them among the newest. Ignored after `close`."""
        if self._file is None or not events:
            return
        self._append([line for event in events for line in self._render(event)])
        if self._clock() - self._renewed_at >= _RENEW_S:
            self._renew()

    def close(self) -> None:
        """Complete the file."""
        if self._file is not None:
            self._renew()
            self._file.write(b"\n]\n")
            self._file.close()
            self._file = None

    # ---- lines -----------------------------------------------------------------------------------

    def _render(self, event: Event) -> list[str]:
        match event:
            case Level(role=role, name=name, at=at, value=value):
                args = {"calls": value}
                return [self._json(role, name, ph="C", name=name, at=at, args=args)]
            case Slice(role=role, track=track, name=name, start=start, end=end, apart=True):
                self._num_pairs += 1
                pair = {"cat": role, "id": self._num_pairs}
                return [
                    self._json(role, track, ph=ph, name=name, at=at, **pair)
                    for ph, at in (("b", start), ("e", end))
                ]
            case Slice(role=role, track=track, name=name, start=start, end=end):
                # Both ends are rounded, so that slices that touch or nest do so in the file.
                duration = self._microseconds(end) - self._microseconds(start)
                return [self._json(role, track, ph="X", name=name, at=start, dur=duration)]

    def _json(self, role: Role, track: str, *, at: float, **fields: Any) -> str:
        """`fields` are any of the format, hence their type."""
        pid = ROLES.index(role) + 1
        known = self._tracks.get((role, track))
        if known is None:
            known = self._tracks[role, track] = len(self._tracks) + 1
            title = _TITLES.get(role, role)
            names: list[tuple[str, dict[str, str | int]]] = [
                ("process_name", {"name": title}),
                ("process_sort_index", {"sort_index": pid}),
                ("thread_name", {"name": track}),
            ]
            for name, args in names:
                self._names.append(
                    _dump({"name": name, "ph": "M", "pid": pid, "tid": known, "args": args})
                )
            self._write(self._names[-len(names) :])
        return _dump({**fields, "pid": pid, "tid": known, "ts": self._microseconds(at)})

    def _microseconds(self, at: float) -> int:
        return max(0, round((at - self._run_started) * 1e6))

    # ---- writing ---------------------------------------------------------------------------------

    def _append(self, lines: Sequence[str]) -> None:
        """The first half to the file, the rest among the newest."""
        room = self._max_head - self._num_head
        head, newest = lines[:room], lines[room:]
        self._write(head)
        self._num_head += len(head)
        self._newest.extend(newest)

    def _write(self, lines: Sequence[str]) -> None:
        """Append lines; they are in the file on return."""
        assert self._file is not None
        for line in lines:
            self._file.write((b"\n" if self._is_empty else b",\n") + line.encode())
            self._is_empty = False
        self._file.flush()
        if not self._newest:
            self._head_end = self._file.tell()

    def _renew(self) -> None:
        """Write the newest half again, with the names of tracks that came after the first half."""
        assert self._file is not None
        self._renewed_at = self._clock()
        if self._newest:
            self._file.seek(self._head_end)
            self._file.truncate()
            self._write([*self._names, *self._newest])

    def _take_over(self, event: dict[str, Any]) -> None:
        """A line of an earlier attempt, as it stands."""
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                role = ROLES[event["pid"] - 1]
                self._tracks.setdefault((role, event["args"]["name"]), event["tid"])
            if (line := _dump(event)) not in self._names:
                self._names.append(line)
                self._write([line])
            return
        if event["ph"] == "i" and event["ts"] == 0:
            self._run_started = event["args"]["unix_seconds"]
        self._num_pairs = max(self._num_pairs, event.get("id", 0))
        self._append([_dump(event)])


def _dump(event: dict[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":"))


def _read(path: Path) -> list[dict[str, Any]]:
    """The events of a file whose end may be missing."""
    events: list[dict[str, Any]] = []
    if not path.is_file():
        return events
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("{"):
            try:
                events.append(json.loads(line.removesuffix(",")))
            except ValueError:
                break  # torn by a crash
    return events
