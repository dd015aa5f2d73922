"""A run directory in a store: the run works in a copy on the driver's node.

    store ──(start: all but checkpoints and models)──► copy ──(every 30 s, and at the end)──► store
    learners ──(checkpoints and models, as they are written)──► store

Files that are not in the store are removed from the copy at the start: what was not uploaded does
not exist. `learner/checkpoint.py` writes and reads the checkpoints.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from distillm_ray.config import Config, RemotePath
from distillm_ray.errors import RunDirectoryError, StoreError
from distillm_ray.remote.lease import LEASE_FILE, Lease
from distillm_ray.remote.store import RemoteDirectory
from distillm_ray.run_directory import (
    BEST_MODEL_FOLDER,
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    MODEL_FOLDER,
    RAY_TRAIN_FOLDER,
)

UPLOAD_INTERVAL_S = 30.0
PARALLEL_UPLOADS = 8
_MODELS = (MODEL_FOLDER, BEST_MODEL_FOLDER)
_NOT_COPIED = (CHECKPOINT_FOLDER, RAY_TRAIN_FOLDER, *_MODELS)


def store_of(config: Config) -> RemoteDirectory | None:
    """The run directory in a store; None if it is a path."""
    place = config.run.directory
    return RemoteDirectory(place) if isinstance(place, RemotePath) else None


@contextmanager
def opened(config: Config) -> Iterator[RunSession | None]:
    """Hold a run directory in a store, copied to this node, during the block; None for a path.

    What the block has written is uploaded at its end, however it ends.

    Raises:
        RunDirectoryError: another job is running there, or it holds something else.
        StoreError: the store cannot be used, with the key.
    """
    directory = store_of(config)
    if directory is None:
        yield None
        return
    try:
        _refuse_what_is_no_run(directory)
        lease = Lease(directory)
    except StoreError as error:
        raise StoreError(f"run.directory: {error}") from error
    try:
        session = RunSession(directory, config.run.local_directory, lease)
        try:
            session.bring()
        except StoreError as error:
            raise StoreError(f"run.directory: {error}") from error
        with session.uploading():
            yield session
    finally:
        lease.release()


class RunSession:
    """A run directory in a store while a job works in it."""

    def __init__(self, directory: RemoteDirectory, copy: Path, lease: Lease) -> None:
        self._directory = directory
        self._copy = copy
        self._lease = lease
        self._uploaded: dict[str, tuple[int, int]] = {}  # size and time of each file
        self._lock = threading.Lock()
        self._failure: StoreError | None = None

    @property
    def token(self) -> str:
        """Of the lease, for the processes that write checkpoints."""
        return self._lease.owner.token

    def check(self) -> None:
        """Raise if the job must end.

        Raises:
            RunDirectoryError: another job has taken the directory.
            StoreError: the store was not reached for too long.
        """
        self._lease.check()

    def bring(self) -> None:
        """Make the copy what the store holds, without checkpoints and models.

        Raises:
            StoreError: the store cannot be used.
        """
        if self._copy.exists():
            for path in self._copy.iterdir():
                if path.name != CHECKPOINT_FOLDER:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._copy.mkdir(parents=True, exist_ok=True)
        for name in self._directory.files():
            if name.partition("/")[0] not in (*_NOT_COPIED, LEASE_FILE):
                self._directory.download(name, self._copy / name, lambda _: None)
                self._uploaded[name] = _facts(self._copy / name)

    def push(self, *, models: bool = False) -> None:
        """Upload what has changed in the copy. In clusters, learners upload the models.

        Raises:
            RunDirectoryError: another job has taken the directory.
            StoreError: the store cannot be used.
        """
        with self._lock:
            self.check()
            left_out = (CHECKPOINT_FOLDER, RAY_TRAIN_FOLDER, *(() if models else _MODELS))
            found = _files(self._copy, left_out)
            for name, path in found.items():
                with contextlib.suppress(FileNotFoundError):  # replaced at this moment
                    facts = _facts(path)
                    if self._uploaded.get(name) != facts:
                        self._directory.upload(path, name)
                        self._uploaded[name] = facts
            for name in self._uploaded.keys() - found.keys():
                if name.partition("/")[0] not in left_out:
                    self._directory.delete(name)
                    del self._uploaded[name]

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Push every `UPLOAD_INTERVAL_S` during the block, and at its end.

        A store that cannot be reached meanwhile is tried again: the lease decides when that took
        too long.
        """
        end = threading.Event()

        def work() -> None:
            while not end.wait(UPLOAD_INTERVAL_S):
                try:
                    self.push()
                except (StoreError, RunDirectoryError):
                    continue  # `check` and the last push raise it again

        thread = threading.Thread(target=work, daemon=True, name="upload")
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
            self.push()


def upload_directory(directory: RemoteDirectory, source: Path, name: str) -> None:
    """Replace what is below a name by the files of a directory.

    `config.json` comes last: no library takes a part of a model for one.
    """
    directory.delete(name)
    files = {path.relative_to(source).as_posix(): path for path in source.rglob("*")}
    files = {relative: path for relative, path in files.items() if path.is_file()}
    last = files.pop("config.json", None)
    upload_files(directory, {f"{name}/{relative}": path for relative, path in files.items()})
    if last is not None:
        directory.upload(last, f"{name}/config.json")


def upload_files(directory: RemoteDirectory, files: dict[str, Path]) -> None:
    """Upload files side by side."""
    with ThreadPoolExecutor(PARALLEL_UPLOADS) as pool:
        for done in [pool.submit(directory.upload, path, name) for name, path in files.items()]:
            done.result()


def _refuse_what_is_no_run(directory: RemoteDirectory) -> None:
    """Nothing else shall be copied here, or written into.

    Raises:
        RunDirectoryError: there are objects, but no config of a run.
    """
    names = [name for name in directory.files() if not name.startswith((LEASE_FILE, ".lease-"))]
    if names and CONFIG_FILE not in names:
        raise RunDirectoryError(
            f"run.directory: {directory.address} is not empty and holds no {CONFIG_FILE}: not a"
            " distillm-ray run; refusing to write into it; choose another address"
        )


def _files(copy: Path, left_out: Sequence[str]) -> dict[str, Path]:
    """The files of a run by name, without hidden and temporary ones."""
    found: dict[str, Path] = {}
    for top in sorted(copy.iterdir()):
        if top.name in left_out or top.name.startswith("."):
            continue
        for path in (top, *sorted(top.rglob("*"))) if top.is_dir() else (top,):
            if path.is_file() and not path.name.endswith(".tmp"):
                found[path.relative_to(copy).as_posix()] = path
    return found


def _facts(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
