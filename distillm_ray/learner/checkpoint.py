"""Checkpoints on disk. Incomplete ones are ignored.

    checkpoints/step-00000100/
      learner/     DeepSpeed's files, each rank's random state, and the anchors of curricula
      buffer.bin   the replay buffer as of draw 100
      meta.json    CheckpointMeta

Every rank writes into `step-00000100.partial`; rank 0 syncs it to disk and renames it. The module
does not use `files.new_directory`, which assumes a single writer. The newest `keep` checkpoints
and the best one by `validation.metric` are kept.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distillm_ray.config import ValidationMetric
from distillm_ray.errors import DISK_FULL, RunDirectoryError
from distillm_ray.files import rename_durably
from distillm_ray.types import Validation

LEARNER_FOLDER = "learner"
BUFFER_FILE = "buffer.bin"
META_FILE = "meta.json"

_COMPLETE = re.compile(r"step-(\d{8,})")
_LOG = logging.getLogger(__name__)

_PARTIAL_SUFFIX = ".partial"


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

    def __init__(self, path: Path, *, keep: int, metric: ValidationMetric = "loss") -> None:
        assert keep >= 1, f"keep must be at least 1, got {keep}"
        self._path = path
        self._keep = keep
        self._metric: ValidationMetric = metric

    def complete(self) -> list[Checkpoint]:
        """Return all complete checkpoints, oldest first."""
        if not self._path.is_dir():
            return []
        found = []
        for path in sorted(self._path.iterdir(), key=lambda path: (len(path.name), path.name)):
            if _COMPLETE.fullmatch(path.name) and (path / META_FILE).is_file():
                try:
                    meta = CheckpointMeta.from_json((path / META_FILE).read_text())
                except (ValueError, KeyError, TypeError):
                    _LOG.warning("%s is damaged and left out: %s cannot be read", path, META_FILE)
                    continue
                found.append(Checkpoint(path=path, meta=meta))
        return found

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
        return self._path / f"step-{step:08d}{_PARTIAL_SUFFIX}"

    def prepare(self, step: int) -> None:
        """Make an empty partial directory and remove those that killed writers left. Rank 0 only.

        Raises:
            RunDirectoryError: the disk is full.
        """
        partial = self.partial_path(step)
        with self.removing_partial_on_failure(step):
            self._path.mkdir(parents=True, exist_ok=True)
            for leftover in self._path.glob(f"*{_PARTIAL_SUFFIX}"):
                shutil.rmtree(leftover)
            (partial / LEARNER_FOLDER).mkdir(parents=True)

    def commit(self, meta: CheckpointMeta, buffer_state: bytes) -> Checkpoint:
        """Add buffer and meta data, sync, rename, and prune. Rank 0 only, after all ranks wrote.

        A complete checkpoint of the same step holds the same state and is kept instead.

        Raises:
            RunDirectoryError: the disk is full; earlier checkpoints are untouched.
        """
        partial = self.partial_path(meta.step)
        final = partial.with_suffix("")
        with self.removing_partial_on_failure(meta.step):
            (partial / BUFFER_FILE).write_bytes(buffer_state)
            (partial / META_FILE).write_text(meta.to_json())
            if final.exists():
                shutil.rmtree(partial)
            else:
                rename_durably(partial, final)
        self._prune()
        return Checkpoint(path=final, meta=meta)

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
                shutil.rmtree(found.path)


def _is_disk_full(error: OSError | RuntimeError) -> bool:
    """torch's archive writer reports a failed write as a RuntimeError without errno."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
