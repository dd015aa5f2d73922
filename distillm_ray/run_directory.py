"""Names of the files in a run directory, and the lock of the job that writes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distillm_ray.directory_lock import locked
from distillm_ray.errors import RunDirectoryError

CONFIG_FILE = "config.yaml"
MODEL_FOLDER = "model"
BEST_MODEL_FOLDER = "model-best"  # where an earlier checkpoint is better than the last
CHECKPOINT_FOLDER = "checkpoints"
RAY_TRAIN_FOLDER = "ray_train"  # Ray Train's own state


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Exclude other jobs on this machine from a run directory.

    Raises:
        RunDirectoryError: another job holds it.
    """
    with locked(directory) as free:
        if not free:
            raise RunDirectoryError(
                f"run.directory: another job is running in {directory}; wait until it ends, or set"
                " run.directory to a new directory to start another run"
            )
        yield
