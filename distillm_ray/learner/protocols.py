"""What the training loop needs: a learner, and the rest of the system as it sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distillm_ray.learner.prefetch import SampleSource
from distillm_ray.log.records import Record, Sample
from distillm_ray.types import (
    Bucket,
    DrawFacts,
    LearnerBatch,
    Rollout,
    TrainStep,
    Validation,
    Weights,
)


class Services(SampleSource, Protocol):
    """The rest of the system, as the learner sees it. Everything below is called by rank 0 only."""

    def restore_buffer(self, state: bytes | None, completed: int) -> None:
        """Put the replay buffer to the state as of draw `completed`; None is the beginning."""
        ...

    def buffer_state(self, completed: int) -> bytes:
        """The buffer as of draw `completed`."""
        ...

    def advance(self, completed: int) -> None:
        """So many steps are done, and their weights were handed over if they were to be."""
        ...

    def wants_weights(self, completed: int) -> bool:
        """Whether generators need the weights of version `completed` (rollout demand, probes)."""
        ...

    def put_bucket(self, bucket: Bucket) -> Any:
        """Hand over one bucket; the result stands for it in `Weights.buckets`."""
        ...

    def publish(self, weights: Weights) -> None:
        """Make `weights` the newest version. Returns before the generators have taken it."""
        ...

    def report_validation(self, validation: Validation) -> float:
        """Adapt the schedule; returns phi from here on."""
        ...

    def start_probe(self) -> None:
        """Have the generators answer a few held-out prompts with the weights just published."""
        ...

    def finish_probe(self) -> list[Rollout]:
        """Wait for those answers."""
        ...

    def samples(self, rollouts: Sequence[Rollout]) -> tuple[Sample, ...]:
        """The answers as text, for the log."""
        ...

    def report_step(self, train: TrainStep, facts: DrawFacts) -> None:
        """Log a step; the services add what the other roles did."""
        ...

    def log(self, record: Record) -> None:
        """Log anything else."""
        ...

    def should_stop(self) -> bool:
        """Whether the job was asked to end (SIGTERM): checkpoint and return."""
        ...


class LearnerRank(Protocol):
    """What the loop needs of a `learner.Learner`; all methods are collectives."""

    rank: int

    def train_step(
        self, batches: Sequence[LearnerBatch], step: int, *, wait_seconds: float
    ) -> TrainStep:
        """See `Learner.train_step`."""
        ...

    def validation_loss(self, batches: Sequence[LearnerBatch]) -> tuple[float, int]:
        """See `Learner.validation_loss`."""
        ...

    def token_logprobs(self, batch: LearnerBatch) -> NDArray[np.float32]:
        """See `Learner.token_logprobs`."""
        ...

    def gather_weights(self, dtype: torch.dtype) -> Iterator[Bucket]:
        """See `Learner.gather_weights`."""
        ...

    def save(self, directory: Path) -> None:
        """See `Learner.save`."""
        ...

    def load(self, directory: Path) -> None:
        """See `Learner.load`."""
        ...

    def export(self, directory: Path) -> None:
        """See `Learner.export`."""
        ...

    def agree(self, flag: bool) -> bool:
        """See `Learner.agree`."""
        ...

    def collect(self, value: Any) -> list[Any]:
        """See `Learner.collect`."""
        ...
