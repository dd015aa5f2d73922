"""The target library: teacher targets on disk, found by their key, shared by runs.

    put ──► collected ──► shard-….safetensors.tmp ── sync, rename ──► shard-….safetensors
    get ◄───────────────── byte ranges by key, from the shards' headers ◄──────┘

    DIRECTORY/<digest of the identity>/about.json         the teacher, for a reader
                                       shard-<uuid>.safetensors

Several processes write at once: a shard has a name of its own, appears whole or not at all, and is
never changed. A target that two of them wrote is there twice, which is harmless. A shard holds the
tensors `KEY/values` or `KEY/ids` and `KEY/log_probs`, bfloat16 as its bits in uint16, and in its
metadata what each target cost the teacher and a checksum of every tensor.

A library never fails a run. What cannot be read is a miss, and its sequence is scored again; when
nothing can be written, the run goes on without writing. `take_warnings` says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from distillm_ray.config import Config
from distillm_ray.files import write_atomically
from distillm_ray.models.safetensors_files import TensorInfo, read_header
from distillm_ray.teacher.target_key import TargetIdentity
from distillm_ray.types import (
    HiddenTargets,
    LogitTargets,
    Rollout,
    ScoreReport,
    Source,
    TeacherTargets,
    TopKTargets,
)

SHARD_BYTES = 16 * 2**20  # collected before a shard is written; a killed process loses less
REFRESH_S = 30.0  # shortest time between two looks for the shards of other processes
ABOUT_FILE = "about.json"
_PREFIX, _SUFFIX = "shard-", ".safetensors"
_STALE_S = 3600.0  # after which an unfinished shard is taken for that of a killed process
_DTYPES = {"U16": np.dtype("<u2"), "F32": np.dtype("<f4"), "I32": np.dtype("<i4")}
# What a file of unknown content can raise: a ModelError is a ValueError.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)

Scored: TypeAlias = tuple[ScoreReport, TeacherTargets]


@dataclass(frozen=True, slots=True, kw_only=True)
class LibrarySettings:
    """Where a run's library is, and whose targets it wants there."""

    directory: Path
    max_bytes: int  # of all teachers together
    identity: TargetIdentity
    teacher: str  # the model directory, for a reader


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryCounters:
    """What was found in a library, and so not scored, since it was opened."""

    sequences: int = 0
    tokens: int = 0  # positions that the teacher would have computed, prompts included
    seconds: float = 0.0  # that the teacher needed for them when it scored them
    stopped: str = ""  # why nothing more is written


NO_LIBRARY = LibraryCounters()


def library_settings(config: Config, identity: TargetIdentity | None) -> LibrarySettings | None:
    """The library of a run; None if it has none, or no targets."""
    if config.targets.library is None or config.teacher is None or identity is None:
        return None
    return LibrarySettings(
        directory=config.targets.library,
        max_bytes=config.targets.library_max_bytes,
        identity=identity,
        teacher=str(config.teacher.model),
    )


def is_shared(rollout: Rollout) -> bool:
    """Whether another run may train on this sequence, so that its targets are worth keeping.

    Text of the data, of the teacher and of the corpus is; what a student samples is its run's own.
    """
    return rollout.source != Source.STUDENT


def identity_digest(identity: TargetIdentity) -> str:
    """The name of the folder that holds all targets of one identity."""
    content = json.dumps(asdict(identity), sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class _Place:
    """One target in one shard."""

    file: Path
    report: ScoreReport
    num_rows: int
    tensors: dict[str, TensorInfo]  # by what follows the key in its name
    checksums: dict[str, int]


class TargetLibrary:
    """The targets of one identity. Used by one thread; a thread of its own writes.

    Example:
        >>> import tempfile
        >>> from distillm_ray.types import HiddenTargets, ScoreReport
        >>> identity = TargetIdentity(teacher="t", kind="hidden", dtype="float32")
        >>> directory = Path(tempfile.mkdtemp())
        >>> settings = LibrarySettings(
        ...     directory=directory, max_bytes=10**6, identity=identity, teacher="models/t"
        ... )
        >>> first = TargetLibrary(settings)
        >>> report = ScoreReport(num_tokens=5, nbytes=24, seconds=0.5)
        >>> first.put("k", HiddenTargets(values_TD=np.ones((2, 3), np.float32)), report)
        >>> first.flush()
        >>> second = TargetLibrary(settings)
        >>> second.get("k", num_rows=2)[1].values_TD.sum()
        np.float32(6.0)
        >>> second.counters.seconds
        0.5
    """

    def __init__(
        self, settings: LibrarySettings, *, owns: Callable[[str], bool] = lambda key: True
    ) -> None:
        """Read the headers of all shards. `owns` says which keys will be asked for."""
        self._settings = settings
        self._folder = settings.directory / identity_digest(settings.identity)
        self._owns = owns
        self._shard_bytes = min(SHARD_BYTES, settings.max_bytes // 8)
        self._places: dict[str, list[_Place]] = {}  # the newest last
        self._known: set[str] = set()  # names of shards
        self._used: set[Path] = set()  # shards that were read or written here
        self._complained: set[Path] = set()
        self._opened = time.time()
        self._looked = -REFRESH_S
        self._folder_changed = -1
        self._collected: dict[str, Scored] = {}
        self._collected_bytes = 0
        self._in_writing: dict[str, Scored] = {}
        self._writing: Future[Path | None] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="target library")
        self._unchecked_room = 0  # bytes that may be written before all shards are counted again
        self._writes = True
        self._warnings: list[str] = []
        self._counters = LibraryCounters()
        self._refresh()

    @property
    def counters(self) -> LibraryCounters:
        """A snapshot."""
        self._settle(wait=False)
        return self._counters

    def take_warnings(self) -> tuple[str, ...]:
        """What went wrong since the last call."""
        self._settle(wait=False)
        taken, self._warnings = tuple(self._warnings), []
        return taken

    def holds(self, key: str, num_rows: int) -> bool:
        """Whether a target with so many rows is here, by the headers; it is not read or counted."""
        if key in self._collected or key in self._in_writing:
            return True
        if key not in self._places:
            self._refresh()
        return any(place.num_rows == num_rows for place in self._places.get(key, ()))

    def get(self, key: str, num_rows: int) -> Scored | None:
        """A target with what it once cost; None if it is not here, damaged or of other rows."""
        self._settle(wait=False)
        for batch in (self._collected, self._in_writing):
            if key in batch:
                return self._counted(batch[key])
        if key not in self._places:
            self._refresh()
        places = self._places.get(key, [])
        while places:
            place = places[-1]
            try:
                targets = _read(place, num_rows, self._settings.identity.kind)
            except FileNotFoundError:
                pass  # removed to make room
            except _UNREADABLE as error:
                self._complain(place.file, error)
            else:
                self._touch(place.file)
                return self._counted((place.report, targets))
            places.pop()
        self._places.pop(key, None)
        return None

    def put(self, key: str, targets: TeacherTargets, report: ScoreReport) -> None:
        """Keep a target. It is written with others, a shard at a time."""
        if not self._writes or key in self._collected or key in self._places:
            return
        self._collected[key] = report, targets
        self._collected_bytes += targets.nbytes
        if self._collected_bytes >= self._shard_bytes:
            self._write_collected()

    def flush(self) -> None:
        """Write what is collected; returns when it is on disk."""
        self._write_collected()
        self._settle(wait=True)

    def close(self) -> None:
        """Flush, and end the writing thread."""
        self.flush()
        self._writer.shutdown()

    # ---- reading ---------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Read the headers of shards that have appeared, at most every `REFRESH_S`."""
        now = time.monotonic()
        if now - self._looked < REFRESH_S:
            return
        self._looked = now
        try:
            changed = self._folder.stat().st_mtime_ns
            if changed == self._folder_changed:
                return
            self._folder_changed = changed
            shards = [path for path in self._folder.iterdir() if _is_shard(path)]
        except FileNotFoundError:
            return  # nothing was written yet
        except OSError as error:
            self._complain(self._folder, error)
            return
        for path in sorted(shards):
            if path.name not in self._known:
                self._index(path)

    def _index(self, path: Path) -> None:
        self._known.add(path.name)
        try:
            metadata, tensors = read_header(path)
            found: dict[str, dict[str, TensorInfo]] = {}
            for name, tensor in tensors.items():
                key, _, part = name.partition("/")
                found.setdefault(key, {})[part] = tensor
            places = {
                key: _place(path, found[key], cost)
                for key, cost in json.loads(metadata["targets"]).items()
                if self._owns(key)
            }
        except FileNotFoundError:
            return
        except _UNREADABLE as error:
            self._complain(path, error)
            return
        for key, place in places.items():
            self._places.setdefault(key, []).append(place)

    def _touch(self, file: Path) -> None:
        """Mark a shard as used: the least recently used ones make room first."""
        if file not in self._used:
            self._used.add(file)
            with contextlib.suppress(OSError):  # another user's file, for example
                os.utime(file)

    def _counted(self, scored: Scored) -> Scored:
        before, (report, _) = self._counters, scored
        self._counters = replace(
            before,
            sequences=before.sequences + 1,
            tokens=before.tokens + report.num_tokens,
            seconds=before.seconds + report.seconds,
        )
        return scored

    def _complain(self, file: Path, error: Exception) -> None:
        if file not in self._complained:
            self._complained.add(file)
            self._warnings.append(
                f"targets.library: {file} cannot be used ({type(error).__name__}: {error}); what it"
                " holds is scored again. Remove it if it is damaged"
            )

    # ---- writing ---------------------------------------------------------------------------------

    def _write_collected(self) -> None:
        """Start to write a shard, after the one before it is on disk."""
        self._settle(wait=True)
        if not self._collected or not self._writes:
            return
        self._in_writing, self._collected = self._collected, {}
        self._collected_bytes = 0
        self._writing = self._writer.submit(self._write, self._in_writing)

    def _settle(self, *, wait: bool) -> None:
        """Take the result of the write in progress, if it has ended or shall be waited for."""
        if self._writing is None or not (wait or self._writing.done()):
            return
        writing, self._writing = self._writing, None
        self._in_writing = {}
        try:
            path = writing.result()
        except OSError as error:
            self._stop_writing(f"{error}; this process writes no more of them")
            return
        if path is None:
            self._stop_writing(
                f"full: targets.library_max_bytes = {self._settings.max_bytes:,} holds nothing that"
                " is unused since the start. What is there stays, and no more is written; raise"
                " targets.library_max_bytes to keep all"
            )
            return
        self._used.add(path)
        self._index(path)

    def _stop_writing(self, reason: str) -> None:
        self._writes = False
        self._collected, self._collected_bytes = {}, 0
        message = f"targets.library: targets cannot be written to {self._folder}: {reason}"
        self._warnings.append(message)
        self._counters = replace(self._counters, stopped=message)

    def _write(self, batch: dict[str, Scored]) -> Path | None:
        """Write one shard; None if there is no room for it. Runs in the writer's thread."""
        tensors: dict[str, NDArray[Any]] = {}
        costs: dict[str, dict[str, Any]] = {}
        for key, (report, targets) in batch.items():
            parts = {name: np.ascontiguousarray(part) for name, part in _parts(targets).items()}
            tensors |= {f"{key}/{name}": part for name, part in parts.items()}
            costs[key] = {
                "tokens": report.num_tokens,
                "seconds": report.seconds,
                "checksums": {name: _checksum(part.tobytes()) for name, part in parts.items()},
            }
        content = save(tensors, metadata={"targets": json.dumps(costs)})
        if not self._has_room(len(content)):
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        about = self._folder / ABOUT_FILE
        if not about.exists():
            settings = self._settings
            facts = {"teacher_directory": settings.teacher, **asdict(settings.identity)}
            own = about.with_name(f"{name}.json")  # others write the same at the same time
            write_atomically(own, f"{json.dumps(facts, indent=2)}\n".encode())
            own.replace(about)
        path = self._folder / f"{_PREFIX}{name}{_SUFFIX}"
        write_atomically(path, content)
        return path

    def _has_room(self, nbytes: int) -> bool:
        """Make room for a shard: the least recently used ones go, of any teacher.

        What was read or written since this library was opened stays: of a data set that is larger
        than the library, a fixed part is kept. Removing the oldest part of it instead, while an
        epoch goes by, would keep nothing that is asked for next.
        """
        if nbytes <= self._unchecked_room:
            self._unchecked_room -= nbytes
            return True
        shards: list[tuple[float, int, Path]] = []
        for path in self._settings.directory.glob(f"*/{_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if _is_shard(path):
                    shards.append((stat.st_mtime, stat.st_size, path))
                elif time.time() - stat.st_mtime > _STALE_S:
                    path.unlink()
        excess = sum(size for _, size, _ in shards) + nbytes - self._settings.max_bytes
        old = sorted(
            shard for shard in shards if shard[0] < self._opened and shard[2] not in self._used
        )
        if sum(size for _, size, _ in old) < excess:
            return False
        for _, size, path in old:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
        # Others write too: only a part of the room that is left is taken without another look.
        self._unchecked_room = max(-excess, 0) // 16
        return True


# ---- targets as tensors --------------------------------------------------------------------------


def _parts(targets: TeacherTargets) -> dict[str, NDArray[Any]]:
    match targets:
        case HiddenTargets(values_TD=values) | LogitTargets(values_TV=values):
            return {"values": values}
        case TopKTargets(ids_TK=ids, log_probs_TK=log_probs):
            return {"ids": ids, "log_probs": log_probs}


def _place(file: Path, tensors: dict[str, TensorInfo], cost: dict[str, Any]) -> _Place:
    (num_rows,) = {tensor.shape[0] for tensor in tensors.values()}
    report = ScoreReport(
        num_tokens=int(cost["tokens"]),
        nbytes=sum(tensor.num_bytes for tensor in tensors.values()),
        seconds=float(cost["seconds"]),
    )
    return _Place(file, report, num_rows, tensors, dict(cost["checksums"]))


def _read(
    place: _Place, num_rows: int, kind: Literal["hidden", "top_k", "logits"]
) -> TeacherTargets:
    """Read one target.

    Raises:
        OSError: the shard cannot be read.
        ValueError: it is not what was written, or has another number of rows.
        KeyError: it is of another kind.
    """
    if place.num_rows != num_rows:
        raise ValueError(f"a target has {place.num_rows} rows for {num_rows} loss tokens")
    parts: dict[str, NDArray[Any]] = {}
    with place.file.open("rb") as stream:
        for name, tensor in place.tensors.items():
            stream.seek(tensor.start)
            content = stream.read(tensor.num_bytes)
            if _checksum(content) != place.checksums[name]:
                raise ValueError("a checksum is wrong")
            parts[name] = np.frombuffer(content, _DTYPES[tensor.dtype]).reshape(tensor.shape)
    match kind:
        case "hidden":
            return HiddenTargets(values_TD=parts["values"])
        case "logits":
            return LogitTargets(values_TV=parts["values"])
        case "top_k":
            return TopKTargets(ids_TK=parts["ids"], log_probs_TK=parts["log_probs"])


def _checksum(content: bytes) -> int:
    return zlib.crc32(content)


def _is_shard(path: Path) -> bool:
    return path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)
