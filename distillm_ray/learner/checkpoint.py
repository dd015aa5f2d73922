"""Checkpoints on disk. Incomplete and damaged ones are left out.

    checkpoints/step-00000100/
      learner/       DeepSpeed's files, each rank's random state, and the anchors of curricula
      buffer.bin     the replay buffer as of draw 100
      meta.json      CheckpointMeta
      manifest.json  size of each other file, in bytes

Every rank writes into `step-00000100.partial`. When all have said what they wrote, rank 0 checks
that it sees these files, syncs them to disk and renames the directory. The module does not use
`files.new_directory`, which assumes a single writer. The newest `keep` checkpoints and the best one
by `validation.metric` are kept.

A run directory in a store has the same layout there. Each node writes into its copy of the
directory and uploads its files. When all nodes have, rank 0 uploads the manifest of all files.
A checkpoint of the store is one whose manifest is there. A node that loads one has it in its copy,
or fetches it.

A checkpoint that lacks a file of its manifest, or has it in another size, is damaged: it is passed
over for the one before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distillm_ray.config import Config, ValidationMetric
from distillm_ray.errors import DISK_FULL, RunDirectoryError, StoreError
from distillm_ray.files import new_directory, rename_durably
from distillm_ray.remote.lease import check_owner
from distillm_ray.remote.run_store import store_of, upload_files
from distillm_ray.remote.store import RemoteDirectory
from distillm_ray.run_directory import CHECKPOINT_FOLDER
from distillm_ray.types import Validation

LEARNER_FOLDER = "learner"
BUFFER_FILE = "buffer.bin"
META_FILE = "meta.json"
MANIFEST_FILE = "manifest.json"
# In a store: a name that no other checkpoint has. The copy on a node may be of an earlier run that
# was at the same address, with files of the same sizes.
STAMP_FILE = "stamp"

_COMPLETE = re.compile(r"step-(\d{8,})")
_PARTIAL_SUFFIX = ".partial"
_VISIBLE_S = 60.0  # after which a network file system shows what another node has written
_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMeta:
    """Facts of a checkpoint that are read without loading it."""

    step: int  # completed optimizer steps
    phi: float
    validation: Validation | None  # the latest one
    rouge_l: float | None = None  # of the probes after this step, where they were scored

    def value(self, metric: ValidationMetric) -> float | None:
        """How good the student is, lower is better; None if that was not measured at this step."""
        match metric:
            case "loss":
                fits = self.validation is not None and self.validation.step == self.step
                value = self.validation.loss if fits and self.validation is not None else math.nan
            case "rouge_l":
                value = math.nan if self.rouge_l is None else -self.rouge_l
        return None if math.isnan(value) else value

    def to_json(self) -> str:
        """Return the content of `meta.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CheckpointMeta:
        """Inverse of `to_json`. Unknown keys are ignored."""
        values = json.loads(text)
        validation = values["validation"]
        return cls(
            step=values["step"],
            phi=values["phi"],
            validation=Validation(**validation) if validation else None,
            rouge_l=values.get("rouge_l"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    meta: CheckpointMeta

    @property
    def learner_path(self) -> Path:
        """The directory that `Learner.load` reads."""
        return self.path / LEARNER_FOLDER

    def buffer_state(self) -> bytes:
        """Read the state that `ReplayBuffer.restore` takes."""
        return (self.path / BUFFER_FILE).read_bytes()


class CheckpointDirectory:
    """The `checkpoints/` of a run. The constructor does not access the disk."""

    def __init__(
        self,
        path: Path,
        *,
        keep: int,
        metric: ValidationMetric = "loss",
        store: RemoteDirectory | None = None,
        lease: str = "",
    ) -> None:
        """`store`: of the run, whose copy on this node `path` lies in. `lease`: of who writes."""
        assert keep >= 1, f"keep must be at least 1, got {keep}"
        self._path = path
        self._keep = keep
        self._metric: ValidationMetric = metric
        self._store = store
        self._lease = lease

    @classmethod
    def of(cls, config: Config, *, lease: str = "") -> CheckpointDirectory:
        """The checkpoints of the run in `run.directory`."""
        return cls(
            config.run.local_directory / CHECKPOINT_FOLDER,
            keep=config.checkpoint.keep,
            metric=config.validation.metric,
            store=store_of(config),
            lease=lease,
        )

    @property
    def in_store(self) -> bool:
        """Whether each node has a copy of its own."""
        return self._store is not None

    def complete(self) -> list[Checkpoint]:
        """Return all complete checkpoints, oldest first."""
        return [found for found in self._read() if isinstance(found, Checkpoint)]

    def damaged(self) -> list[str]:
        """Path and damage of each checkpoint that `complete` leaves out, oldest first."""
        return [found for found in self._read() if isinstance(found, str)]

    def _read(self) -> list[Checkpoint | str]:
        if self._store is not None:
            return list(self._read_store(self._store))
        if not self._path.is_dir():
            return []
        paths = sorted(self._path.iterdir(), key=lambda path: (len(path.name), path.name))
        return [_read(path) for path in paths if _COMPLETE.fullmatch(path.name)]

    def _read_store(self, store: RemoteDirectory) -> Iterator[Checkpoint | str]:
        """The checkpoints of the store, oldest first. `path`: where this node has or gets them."""
        objects = store.files(CHECKPOINT_FOLDER)
        sizes: dict[str, dict[str, int]] = {}  # by checkpoint and file
        for name, found in objects.items():
            _, step, file = name.split("/", 2)
            sizes.setdefault(step, {})[file] = found.size
        for step in sorted(sizes, key=lambda name: (len(name), name)):
            # Without a manifest an upload was cut off.
            if _COMPLETE.fullmatch(step) and MANIFEST_FILE in sizes[step]:
                folder = f"{CHECKPOINT_FOLDER}/{step}"

                def text(file: str, folder: str = folder) -> str:
                    content = store.read(f"{folder}/{file}")
                    if content is None:
                        raise FileNotFoundError(file)
                    return content.decode()

                where = str(store.address.child(folder))
                yield _checked(self._path / step, where, sizes[step], text)

    def here(self, checkpoint: Checkpoint) -> None:
        """Make the files of a checkpoint present on this node. One rank of each node only.

        Raises:
            StoreError: the store cannot be used.
        """
        if self._store is None:
            return
        folder = f"{CHECKPOINT_FOLDER}/{checkpoint.path.name}"
        objects = self._store.files(folder)
        self._path.mkdir(parents=True, exist_ok=True)
        present = _sizes(checkpoint.path) if checkpoint.path.is_dir() else {}
        if STAMP_FILE in present and all(
            present.get(name.removeprefix(f"{folder}/")) == objects[name].size for name in objects
        ):
            stamp = self._store.read(f"{folder}/{STAMP_FILE}")
            if stamp == (checkpoint.path / STAMP_FILE).read_bytes():
                return
        with new_directory(checkpoint.path, replace=True) as partial:
            for name in objects:
                self._store.download(name, partial / name.removeprefix(f"{folder}/"), _no_progress)

    def latest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint."""
        return max(self.complete(), key=lambda found: found.meta.step, default=None)

    def best(self) -> Checkpoint | None:
        """Return the best complete checkpoint by the metric, the earliest on ties.

        Only checkpoints of a step with a validation can be.
        """
        values = [(found.meta.value(self._metric), found) for found in self.complete()]
        scored = [(value, found) for value, found in values if value is not None]
        return min(scored, key=lambda pair: pair[0], default=(0.0, None))[1]

    def partial_path(self, step: int) -> Path:
        """Return the directory that all ranks write the checkpoint of `step` into."""
        return self._path / f"{_name(step)}{_PARTIAL_SUFFIX}"

    def prepare(self, step: int) -> None:
        """Make an empty partial directory and remove those that killed writers left.

        One rank of each node that has a copy of its own; rank 0 alone where all nodes share it.

        Raises:
            RunDirectoryError: the disk is full.
        """
        partial = self.partial_path(step)
        with self.removing_partial_on_failure(step):
            self._path.mkdir(parents=True, exist_ok=True)
            for leftover in self._path.glob(f"*{_PARTIAL_SUFFIX}"):
                shutil.rmtree(leftover)
            (partial / LEARNER_FOLDER).mkdir(parents=True)

    def written(self, step: int) -> dict[str, int]:
        """Sizes of the files that this rank sees in the partial directory, by relative path."""
        return _sizes(self.partial_path(step))

    def upload(self, step: int) -> None:
        """Upload what the ranks of this node have written. One rank of each node only.

        Raises:
            StoreError: the store cannot be used.
            RunDirectoryError: another job has taken the run directory.
        """
        assert self._store is not None
        check_owner(self._store, self._lease)
        if self._in_store(step):
            return
        partial = self.partial_path(step)
        folder = f"{CHECKPOINT_FOLDER}/{_name(step)}"
        upload_files(self._store, {f"{folder}/{name}": partial / name for name in _sizes(partial)})

    def _in_store(self, step: int) -> bool:
        """Whether the store has a complete checkpoint of this step."""
        return any(found.meta.step == step for found in self.complete())

    def _commit_to_store(
        self, store: RemoteDirectory, step: int, written: Sequence[Mapping[str, int]]
    ) -> None:
        """Upload what rank 0 alone has written, the manifest of all nodes' files last."""
        partial = self.partial_path(step)
        folder = f"{CHECKPOINT_FOLDER}/{_name(step)}"
        sizes = {name: size for of_rank in written for name, size in of_rank.items()}
        (partial / STAMP_FILE).write_text(uuid.uuid4().hex)
        for name in (BUFFER_FILE, META_FILE, STAMP_FILE):
            store.upload(partial / name, f"{folder}/{name}")
            sizes[name] = (partial / name).stat().st_size
        found = store.files(folder)
        for name, size in sizes.items():
            at_store = found.get(f"{folder}/{name}")
            if at_store is None or at_store.size != size:
                raise StoreError(
                    f"{store.address.child(folder)} must have {name} with {size:,} bytes and does"
                    " not: an upload was cut off; no checkpoint was written"
                )
        check_owner(store, self._lease)
        store.write(f"{folder}/{MANIFEST_FILE}", json.dumps(sizes, indent=2).encode())

    def commit(
        self, meta: CheckpointMeta, buffer_state: bytes, written: Sequence[Mapping[str, int]] = ()
    ) -> Checkpoint:
        """Add buffer, meta data and manifest, sync, rename, and prune. Rank 0 only.

        A complete checkpoint of the same step holds the same state and is kept instead. With a
        store this holds for the store's: the one in the copy may be of another run.

        Args:
            written: for each rank what `written` returned, after all ranks had written.

        Raises:
            RunDirectoryError: the disk is full, or rank 0 does not see what another rank wrote;
                earlier checkpoints are untouched.
        """
        partial = self.partial_path(meta.step)
        final = partial.with_suffix("")
        if self._store is None:
            self._await_files(meta.step, written)
        with self.removing_partial_on_failure(meta.step):
            (partial / BUFFER_FILE).write_bytes(buffer_state)
            (partial / META_FILE).write_text(meta.to_json())
            if self._store is not None and not self._in_store(meta.step):
                self._commit_to_store(self._store, meta.step, written)
            (partial / MANIFEST_FILE).write_text(json.dumps(_sizes(partial), indent=2))
            if self._store is None and final.exists() and isinstance(_read(final), Checkpoint):
                shutil.rmtree(partial)
            else:
                if final.exists():
                    shutil.rmtree(final)
                rename_durably(partial, final)
        self._prune()
        return Checkpoint(path=final, meta=meta)

    def _await_files(self, step: int, written: Sequence[Mapping[str, int]]) -> None:
        """Wait until this rank sees the files that all ranks wrote.

        Raises:
            RunDirectoryError: it does not, so the directory is not shared.
        """
        deadline = time.monotonic() + _VISIBLE_S
        while True:
            seen = self.written(step)
            absent = [
                (rank, name)
                for rank, sizes in enumerate(written)
                for name, size in sizes.items()
                if seen.get(name) != size
            ]
            if not absent:
                return
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        rank, name = absent[0]
        raise RunDirectoryError(
            f"run.directory must be a directory that all nodes with a learner share:"
            f" {self.partial_path(step)} lacks {name} (or a part of it) on the node of rank 0, and"
            f" rank {rank} has it; no checkpoint was written"
        )

    @contextmanager
    def removing_partial_on_failure(self, step: int) -> Iterator[None]:
        """Remove the partial directory of `step` if the block fails to write.

        Raises:
            RunDirectoryError: in place of the error of a full disk.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:
            shutil.rmtree(self.partial_path(step), ignore_errors=True)
            if not _is_disk_full(error):
                raise
            previous = self.latest()
            kept = f"{previous.path} remains valid" if previous else "there is no earlier one"
            raise RunDirectoryError(
                f"no space left for the checkpoint of step {step} in {self._path}; {kept}. Free"
                " some space and run the same command again, or lower checkpoint.keep"
            ) from error

    def _prune(self) -> None:
        complete = self.complete()
        best = self.best()
        for found in complete[: -self._keep]:
            if best is None or found.path != best.path:
                self._delete(found.path)
        if self._store is not None:
            self._delete_cut_off(self._store)

    def _delete(self, path: Path) -> None:
        """Delete a checkpoint, in the store too, its manifest first."""
        if self._store is not None:
            folder = f"{CHECKPOINT_FOLDER}/{path.name}"
            self._store.delete(f"{folder}/{MANIFEST_FILE}")
            self._store.delete(folder)
        shutil.rmtree(path, ignore_errors=self._store is not None)  # which a copy may lack

    def _delete_cut_off(self, store: RemoteDirectory) -> None:
        """Delete what uploads that were cut off have left in the store."""
        names = [name.split("/", 2)[1:] for name in store.files(CHECKPOINT_FOLDER)]
        whole = {step for step, file in names if file == MANIFEST_FILE}
        for step in sorted({step for step, _ in names} - whole):
            store.delete(f"{CHECKPOINT_FOLDER}/{step}")


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file below a directory, by its relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _read(path: Path) -> Checkpoint | str:
    """A checkpoint on disk, or what is wrong with it."""
    return _checked(path, str(path), _sizes(path), lambda file: (path / file).read_text())


def _checked(
    path: Path, where: str, sizes: Mapping[str, int], text: Callable[[str], str]
) -> Checkpoint | str:
    """A checkpoint with files of these sizes, or what is wrong with it; `text` reads a file."""
    try:
        expected: dict[str, int] = json.loads(text(MANIFEST_FILE))
        for name, size in expected.items():
            if (found := sizes.get(name)) != size:
                there = "is missing" if found is None else f"has {found:,} bytes"
                return f"{where} is damaged: {name} must have {size:,} bytes and {there}"
        meta = CheckpointMeta.from_json(text(META_FILE))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        return f"{where} is damaged: {MANIFEST_FILE} or {META_FILE} cannot be read: {error}"
    return Checkpoint(path=path, meta=meta)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _no_progress(num_bytes: int) -> None:
    """Downloads of checkpoints show none: workers have no terminal."""


def _is_disk_full(error: OSError | RuntimeError) -> bool:
    """torch's archive writer reports a failed write as a RuntimeError without errno."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
