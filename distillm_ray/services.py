"""The learner's side of the wires: `train_loop.Services` over Ray actors.

Every call has a limit. What a step reports to the log is not waited for: its result is looked at
one step later, so that a broken log is noticed without standing in the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from distillm_ray.config import Config
from distillm_ray.errors import ClusterError
from distillm_ray.pools import Actor, store_index
from distillm_ray.prefetch import RankPlan
from distillm_ray.records import DrawFacts, Record
from distillm_ray.types import Rollout, TeacherTargets, TrainStep, Validation, Weights
from distillm_ray.weight_files import Bucket

CALL_TIMEOUT_S = 120.0
MAX_SCORING_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wires:
    """Handles of everything a learner talks to."""

    buffer: Actor
    loop: Actor
    stores: tuple[Actor, ...]
    metrics: Actor


class ActorServices:
    """See `train_loop.Services`; each rank has one, and rank 0 does most of the talking."""

    def __init__(self, wires: Wires, config: Config) -> None:
        self._wires = wires
        self._config = config
        self._has_generators = config.wants_rollouts
        self._last_report: ray.ObjectRef[Any] | None = None

    # ---- samples ---------------------------------------------------------------------------------

    def draw(self, step: int, rank: int, timeout_s: float) -> RankPlan | None:
        """See `prefetch.SampleSource`."""
        call = self._wires.buffer.draw.remote(step, rank, timeout_s)
        return ray.get(call, timeout=timeout_s + CALL_TIMEOUT_S)

    def waiting_for(self, step: int) -> str:
        """See `prefetch.SampleSource`."""
        return self._ask(self._wires.buffer.waiting_for.remote(step))

    def fetch_targets(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherTargets]:
        """See `prefetch.SampleSource`. What no store has any more is scored again.

        Raises:
            ClusterError: the stores lose targets as fast as they are scored.
        """
        targets: dict[str, TeacherTargets] = {}
        missing = list(rollouts)
        for _ in range(MAX_SCORING_ROUNDS):
            targets.update(self._from_stores(missing))
            missing = [one for one in missing if one.rollout_id not in targets]
            if not missing:
                return targets
            self._ask(
                self._wires.loop.ensure_targets.remote(missing),
                timeout_s=self._config.learner.data_timeout_s,
            )
        raise ClusterError(
            f"{len(missing)} teacher targets were gone again after being scored"
            f" {MAX_SCORING_ROUNDS} times, {missing[0].rollout_id} among them: targets.max_bytes ="
            f" {self._config.targets.max_bytes} does not hold the targets of a step; raise it"
        )

    # ---- buffer ----------------------------------------------------------------------------------

    def restore_buffer(self, state: bytes | None, completed: int) -> None:
        """See `train_loop.Services`."""
        self._ask(self._wires.loop.restore_buffer.remote(state, completed), timeout_s=None)

    def buffer_state(self, completed: int) -> bytes:
        """See `train_loop.Services`."""
        return self._ask(self._wires.buffer.state.remote(completed))

    def advance(self, completed: int) -> None:
        """See `train_loop.Services`."""
        self._ask(self._wires.buffer.advance.remote(completed))

    def report_validation(self, validation: Validation) -> float:
        """See `train_loop.Services`."""
        return self._ask(self._wires.buffer.report.remote(validation))

    # ---- weights ---------------------------------------------------------------------------------

    def wants_weights(self, completed: int) -> bool:
        """See `train_loop.Services`. The last weights of a run are what is evaluated."""
        if completed == self._config.learner.steps and self._config.evaluation.at_end:
            return True
        return self._has_generators and self._ask(self._wires.buffer.wants_weights.remote())

    def put_bucket(self, bucket: Bucket) -> Any:
        """See `train_loop.Services`: the object store's reference."""
        return ray.put(bucket)

    def publish(self, weights: Weights) -> None:
        """See `train_loop.Services`."""
        timeout_s = self._config.rollout.timeout_s + CALL_TIMEOUT_S
        self._ask(self._wires.loop.publish.remote(weights), timeout_s=timeout_s)

    # ---- log -------------------------------------------------------------------------------------

    def report_step(self, train: TrainStep, facts: DrawFacts, logprob_gap: float) -> None:
        """See `train_loop.Services`."""
        if self._last_report is not None:
            self._ask(self._last_report)
        self._last_report = self._wires.loop.report_step.remote(train, facts, logprob_gap)

    def log(self, record: Record) -> None:
        """See `train_loop.Services`."""
        self._ask(self._wires.metrics.add.remote(record))

    def should_stop(self) -> bool:
        """See `train_loop.Services`."""
        return self._ask(self._wires.buffer.stop_requested.remote())

    # ---- inside ----------------------------------------------------------------------------------

    def _ask(self, call: Any, *, timeout_s: float | None = CALL_TIMEOUT_S) -> Any:
        limit = timeout_s if timeout_s is not None else self._config.run.startup_timeout_s
        return ray.get(call, timeout=limit)

    def _from_stores(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherTargets]:
        """What the stores have, each asked once. A payload that cannot be read is dropped there."""
        stores = self._wires.stores
        by_store: dict[int, list[str]] = {}
        for rollout in rollouts:
            index = store_index(rollout.rollout_id, len(stores))
            by_store.setdefault(index, []).append(rollout.rollout_id)
        found: dict[str, tuple[int, ray.ObjectRef[Any]]] = {}
        calls = {index: stores[index].get.remote(ids) for index, ids in by_store.items()}
        for index, call in calls.items():
            for rollout_id, reference in self._ask(call).items():
                found[rollout_id] = index, reference
        try:
            payloads = ray.get(
                [reference for _, reference in found.values()], timeout=CALL_TIMEOUT_S
            )
            return dict(zip(found, payloads, strict=True))
        except RayError:  # a bulk get raises at the first bad one: go one by one
            return self._one_by_one(found)

    def _one_by_one(
        self, found: dict[str, tuple[int, ray.ObjectRef[Any]]]
    ) -> dict[str, TeacherTargets]:
        targets: dict[str, TeacherTargets] = {}
        for rollout_id, (index, reference) in found.items():
            try:
                targets[rollout_id] = ray.get(reference, timeout=CALL_TIMEOUT_S)
            except RayError:
                self._ask(self._wires.stores[index].drop.remote([rollout_id]))
        return targets
