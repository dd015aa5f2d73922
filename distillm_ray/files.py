"""Files and directories that appear complete or not at all, even after a power failure.

Content is written beside the target, synced to disk and renamed into place.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from distillm_ray.errors import RunDirectoryError


def write_atomically(path: Path, content: bytes) -> None:
    """Write or replace a file. On failure the previous content stays, and nothing beside it.

    Raises:
        OSError: the disk is full, for example; `filename` is set.
    """
    with new_file(path) as file:
        file.write(content)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path`, or replaces it, when the block ends.

    If the block raises, the previous content stays, and nothing beside it.

    Raises:
        OSError: the disk is full, for example; `filename` is set.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        rename_durably(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write or fsync names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(directory: Path, key: str) -> None:
    """Check that a directory is there and can be written, or can be made; makes nothing.

    Args:
        key: the config key or option that names it, for the message.

    Raises:
        RunDirectoryError: something on the way is a file, or does not let this user.
    """
    existing = directory.absolute()
    while not existing.exists() and not existing.is_symlink():
        existing = existing.parent
    if not existing.is_dir():
        wrong = "must be a directory, it is a file"
        if existing != directory.absolute():
            wrong = f"cannot be made ({existing} is a file)"
        raise RunDirectoryError(f"{key}: {directory} {wrong}")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise RunDirectoryError(
            f"{key}: {directory} cannot be read and written ({existing} does not let this user)"
        )


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path`, which becomes `path` when the block ends.

    If the block raises, the directory is removed and `path` is untouched.

    Args:
        replace: remove an existing `path` just before the rename, and what killed writers of
            `path` left beside it. Allows one writer at a time.

    Raises:
        OSError: without `replace`, `path` exists and is not empty.
    """
    if replace:
        for leftover in path.parent.glob(f".{path.name}.*.partial"):
            shutil.rmtree(leftover)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if replace and path.exists():
            shutil.rmtree(path)
        rename_durably(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rename_durably(source: Path, target: Path) -> None:
    """Sync a file, or a directory with all that it holds, and rename it within its directory."""
    for folder, _, names in os.walk(source):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))
    if source.is_file():
        _sync(source)
    source.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
