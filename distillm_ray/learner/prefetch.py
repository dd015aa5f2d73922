"""Batches that are fetched and packed ahead of the training thread.

One worker thread waits for the draw of a step, fetches its teacher targets and packs its rows. The
training thread takes the steps in order and gets the worker's errors. Draws made ahead change
nothing: a checkpoint holds the buffer as of the step that the learner completed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from distillm_ray.batching import pack
from distillm_ray.cluster.buffer import ReplayConsumer
from distillm_ray.cluster.targets import TargetReader
from distillm_ray.types import DrawFacts, LearnerBatch, RankPlan, Rollout

_DRAW_TIMEOUT_S = 2.0  # how long a stopped prefetcher may still wait for a draw


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedStep:
    """What one rank trains on in one step, ready to run."""

    phi: float  # of the draw
    facts: DrawFacts | None  # of the whole step; rank 0's only
    batches: tuple[LearnerBatch, ...]
    wait_seconds: float = 0.0  # how long the training loop waited for it


class Prefetcher:
    """Prepares the steps `first_step ... total_steps - 1` of one rank, `depth` of them ahead.

    Use it as a context manager: leaving it stops the worker thread and drops what it prepared.
    """

    def __init__(
        self,
        buffer: ReplayConsumer,
        targets: TargetReader | None,
        *,
        rank: int,
        first_step: int,
        total_steps: int,
        depth: int,
    ) -> None:
        """`targets` is None without a teacher."""
        self._buffer = buffer
        self._targets = targets
        self._rank = rank
        self._next_step = first_step
        self._total_steps = total_steps
        self._depth = depth
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

    def poll(self, step: int, timeout_s: float) -> PreparedStep | None:
        """The batches of `step`, or None if they are not ready after `timeout_s`.

        Steps are taken in order, each once. Raises what the worker raised.
        """
        while self._next_step < min(step + 1 + self._depth, self._total_steps):
            self._pending[self._next_step] = self._worker.submit(self._prepare, self._next_step)
            self._next_step += 1
        future = self._pending[step]
        if not wait([future], timeout=timeout_s).done:
            return None
        del self._pending[step]
        return future.result()

    def _prepare(self, step: int) -> PreparedStep:
        plan = None
        while plan is None:
            if self._stopped.is_set():
                raise CancelledError
            plan = self._buffer.draw(step, self._rank, _DRAW_TIMEOUT_S)
        targets = None if self._targets is None else self._targets.fetch(_rollouts(plan))
        batches = tuple(pack(micro_batch, targets) for micro_batch in plan.micro_batches)
        return PreparedStep(phi=plan.phi, facts=plan.facts, batches=batches)


def _rollouts(plan: RankPlan) -> Sequence[Rollout]:
    """Each rollout that needs targets once, in the order of the plan."""
    by_id = {
        sequence.rollout.rollout_id: sequence.rollout
        for micro_batch in plan.micro_batches
        for sequence in micro_batch.sequences
        if sequence.needs_targets
    }
    return list(by_id.values())
