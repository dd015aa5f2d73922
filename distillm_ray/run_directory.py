"""What a run directory holds, by name, and who may write it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distillm_ray.directory_lock import locked
from distillm_ray.errors import RunDirectoryError

CONFIG_FILE = "config.yaml"
MODEL_FOLDER = "model"
CHECKPOINT_FOLDER = "checkpoints"


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """One job of a machine at a time writes to a run directory.

    Raises:
        RunDirectoryError: another job is at work in it.
    """
    with locked(directory) as free:
        if not free:
            raise RunDirectoryError(
                f"run.directory: another job is at work in {directory}: wait until it has ended,"
                " or set run.directory to a new directory to start another run"
            )
        yield
