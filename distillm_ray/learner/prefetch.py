"""Batches fetched and collated ahead of the training thread.

One worker thread: wait for the draw of a step, fetch its teacher targets, pack. The training
thread takes steps in order and sees the worker's errors. Draws made ahead change nothing: a
checkpoint holds the buffer as of the step that the learner completed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from distillm_ray.batching import pack
from distillm_ray.errors import ClusterError
from distillm_ray.types import DrawFacts, LearnerBatch, RankPlan, Rollout, TeacherTargets

_POLL_S = 2.0  # how long a stopped prefetcher may still wait for a draw


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedStep:
    """What one rank trains on in one step, ready to run."""

    facts: DrawFacts
    batches: tuple[LearnerBatch, ...]
    wait_seconds: float  # the training thread waited so long for it


class SampleSource(Protocol):
    """Where plans and teacher targets come from. Called from the worker thread."""

    def draw(self, step: int, rank: int, timeout_s: float) -> RankPlan | None:
        """This rank's plan for `step`; None if it is not ready after `timeout_s`."""
        ...

    def waiting_for(self, step: int) -> str:
        """What the draw of `step` still lacks, for a message."""
        ...

    def fetch_targets(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherTargets]:
        """The targets of every rollout, by rollout id; has a limit of its own."""
        ...


class Prefetcher:
    """Prepares the steps `first_step ... total_steps - 1` of one rank, `depth` of them ahead.

    Use it as a context manager: leaving it stops the worker thread and drops what it prepared.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        rank: int,
        first_step: int,
        total_steps: int,
        depth: int,
        timeout_s: float,
        with_targets: bool,
    ) -> None:
        self._source = source
        self._rank = rank
        self._next_step = first_step
        self._total_steps = total_steps
        self._depth = depth
        self._timeout_s = timeout_s
        self._with_targets = with_targets
        self._stopped = threading.Event()
        self._pending: dict[int, Future[PreparedStep]] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def get(self, step: int) -> PreparedStep:
        """The batches of `step`; waits for them. Steps are taken in order, each once.

        Raises:
            ClusterError: they did not come within `timeout_s`.
        """
        while self._next_step < min(step + 1 + self._depth, self._total_steps):
            self._pending[self._next_step] = self._worker.submit(self._prepare, self._next_step)
            self._next_step += 1
        started = time.monotonic()
        future = self._pending.pop(step)
        if not wait([future], timeout=self._timeout_s).done:
            raise ClusterError(
                f"the samples of step {step} did not come within learner.data_timeout_s ="
                f" {self._timeout_s:g} s; waiting for {self._source.waiting_for(step)}"
            )
        prepared = future.result()
        return PreparedStep(
            facts=prepared.facts,
            batches=prepared.batches,
            wait_seconds=time.monotonic() - started,
        )

    def _prepare(self, step: int) -> PreparedStep:
        plan = None
        while plan is None:
            if self._stopped.is_set():
                raise CancelledError
            plan = self._source.draw(step, self._rank, _POLL_S)
        targets = self._source.fetch_targets(_rollouts(plan)) if self._with_targets else None
        batches = tuple(pack(micro_batch, targets) for micro_batch in plan.micro_batches)
        return PreparedStep(facts=plan.facts, batches=batches, wait_seconds=0.0)


def _rollouts(plan: RankPlan) -> list[Rollout]:
    """Each rollout once, in the order of the plan."""
    by_id = {
        sequence.rollout.rollout_id: sequence.rollout
        for micro_batch in plan.micro_batches
        for sequence in micro_batch.sequences
    }
    return list(by_id.values())
