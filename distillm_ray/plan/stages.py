"""Stage times: what each part of a step takes alone, measured (`probe.py`) or read from a file.

All times are seconds of the process that works, at the number of threads that the config gives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from pydantic import TypeAdapter, ValidationError

from distillm_ray.errors import UserError
from distillm_ray.files import write_atomically
from distillm_ray.types import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTimes:
    """A generator. An engine's step gives every request in flight one token."""

    engine_step: float  # the part of an engine's step that every number of requests costs
    token: float  # what each request in flight adds to it
    prompt_token: float  # reading a prompt, per token
    load: float  # taking published weights
    response_tokens: tuple[int, ...]  # lengths of responses as the student gives them

    def __post_init__(self) -> None:
        """Refuse a generator whose responses would take no time."""
        if not self.response_tokens or min(self.response_tokens) < 1:
            raise ValueError(
                "generation.response_tokens must name at least one length of at least 1 token, got"
                f" {list(self.response_tokens)}"
            )
        if self.engine_step + self.token <= 0.0:
            raise ValueError("generation.engine_step + generation.token must be above 0, got 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringTimes:
    """A scorer's forward pass."""

    batch: float  # the part that every pass costs
    token: float  # prompts included


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningTimes:
    """One rank of the learner."""

    step: float  # clipping and the optimizer's step
    row: float  # forward and backward: the part that every packed row costs
    token: float  # forward and backward, prompts included
    loss_token: float  # what a token of the loss adds: the output head and the divergence
    validation_token: float  # prompts included
    gather: float  # of the weights, to publish them
    checkpoint: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Everything that the simulation knows of a machine."""

    device: Device
    cores: int  # of the machine that was measured
    learning: LearningTimes
    generation: GenerationTimes | None = None  # None: the run generates nothing
    scoring: ScoringTimes | None = None  # None: no term of the loss needs the teacher
    # How much longer one process takes while all other cores are busy, memory and caches being
    # shared: at least 1, and 1 on GPUs.
    contention: float = 1.0


_STAGES: TypeAdapter[Stages] = TypeAdapter(Stages)


def read_stages(path: Path) -> Stages:
    """The stage times of a file.

    Raises:
        UserError: it cannot be read, or does not hold stage times.
    """
    try:
        return _STAGES.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"--stages: {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"--stages: {path} must hold stage times as --save-stages writes them; {place}:"
            f" {first['msg']}"
        ) from error


def write_stages(path: Path, stages: Stages) -> None:
    """Write them as JSON, to be read by `read_stages`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _STAGES.dump_json(stages, indent=1) + b"\n")


def non_negative_fit(features: ArrayLike, seconds: ArrayLike) -> tuple[float, ...]:
    """Coefficients c >= 0 for which `features @ c` comes close to `seconds`, by relative error.

    A time is a sum of parts, none of which is negative. A column whose coefficient would be is left
    out, the most negative one first.

    Example:
        >>> fit = non_negative_fit([[1, 1], [1, 4], [1, 8]], [3.0, 9.0, 17.0])
        >>> [round(value, 6) for value in fit]  # 1 + 2 n
        [1.0, 2.0]
        >>> non_negative_fit([[1, 1], [1, 2]], [2.0, 1.0])[1]
        0.0
    """
    times = np.asarray(seconds, dtype=np.float64)
    matrix = np.asarray(features, dtype=np.float64) / times[:, None]
    kept = list(range(matrix.shape[1]))
    while kept:
        found, *_ = np.linalg.lstsq(matrix[:, kept], np.ones(len(times)), rcond=None)
        lowest = int(found.argmin())
        if found[lowest] >= 0.0:
            break
        del kept[lowest]
    coefficients = [0.0] * matrix.shape[1]
    for column, value in zip(kept, found, strict=True) if kept else ():
        coefficients[column] = float(value)
    return tuple(coefficients)
