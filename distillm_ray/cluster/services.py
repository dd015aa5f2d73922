"""The learner's side of the wires: `protocols.Services` over Ray actors.

Every call has a limit, and a TimeoutError says who did not answer. A role's user error arrives as
itself, and so does `BufferLost`, with which the rank fails: no call here can mend it. What a step
reports to the log is not waited for: its result is looked at one step later, so that a broken log
is noticed without standing in the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from distillm_ray.cluster.actor_pool import Actor
from distillm_ray.cluster.buffer_actor import BufferLost
from distillm_ray.cluster.pools import GENERATOR_CALL_TIMEOUTS, store_index
from distillm_ray.config import Config
from distillm_ray.data.templates import decode
from distillm_ray.errors import ClusterError, UserError
from distillm_ray.log.records import Record, Sample
from distillm_ray.types import (
    Bucket,
    DrawFacts,
    Prompt,
    RankPlan,
    Rollout,
    TeacherTargets,
    TrainStep,
    Validation,
    Weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """See `protocols.Services`; each rank has one, and rank 0 does most of the talking."""

    def __init__(
        self,
        wires: Wires,
        config: Config,
        *,
        tokenizer: PreTrainedTokenizerBase,
        probe_prompts: Sequence[Prompt] = (),
    ) -> None:
        """`probe_prompts` are held-out prompts; the tokenizer only decodes answers to them."""
        self._wires = wires
        self._config = config
        self._tokenizer = tokenizer
        self._probe_prompts = probe_prompts
        self._probe: ray.ObjectRef[Any] | None = None
        self._has_generators = config.wants_rollouts
        self._last_report: ray.ObjectRef[Any] | None = None

    # ---- samples ---------------------------------------------------------------------------------

    def draw(self, step: int, rank: int, timeout_s: float) -> RankPlan | None:
        """See `prefetch.SampleSource`."""
        call = self._wires.buffer.draw.remote(step, rank, timeout_s)
        return _ask(call, "the replay buffer's draw", timeout_s + CALL_TIMEOUT_S)

    def waiting_for(self, step: int) -> str:
        """See `prefetch.SampleSource`."""
        return _ask(self._wires.buffer.waiting_for.remote(step), "the replay buffer")

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
            _ask(
                self._wires.loop.ensure_targets.remote(missing),
                f"scoring {len(missing)} sequences (learner.data_timeout_s)",
                self._config.learner.data_timeout_s,
            )
        raise ClusterError(
            f"{len(missing)} teacher targets were gone again after being scored"
            f" {MAX_SCORING_ROUNDS} times, {missing[0].rollout_id} among them: targets.max_bytes ="
            f" {self._config.targets.max_bytes} does not hold the targets of a step; raise it"
        )

    # ---- buffer ----------------------------------------------------------------------------------

    def restore_buffer(self, state: bytes | None, completed: int) -> None:
        """See `protocols.Services`."""
        _ask(
            self._wires.loop.restore_buffer.remote(state, completed),
            "going back to the checkpoint (run.startup_timeout_s)",
            self._config.run.startup_timeout_s,
        )

    def buffer_state(self, completed: int) -> bytes:
        """See `protocols.Services`."""
        return _ask(self._wires.buffer.state.remote(completed), "the replay buffer's state")

    def advance(self, completed: int) -> None:
        """See `protocols.Services`."""
        _ask(self._wires.buffer.advance.remote(completed), "the replay buffer")

    def report_validation(self, validation: Validation) -> float:
        """See `protocols.Services`."""
        return _ask(self._wires.buffer.report.remote(validation), "the replay buffer")

    # ---- weights ---------------------------------------------------------------------------------

    def wants_weights(self, completed: int) -> bool:
        """See `protocols.Services`. The last weights of a run are what is evaluated."""
        if completed == self._config.learner.steps and self._config.evaluation.at_end:
            return True
        return self._has_generators and _ask(
            self._wires.buffer.wants_weights.remote(), "the replay buffer"
        )

    def put_bucket(self, bucket: Bucket) -> Any:
        """See `protocols.Services`: the object store's reference."""
        return ray.put(bucket)

    def publish(self, weights: Weights) -> None:
        """See `protocols.Services`."""
        _ask(
            self._wires.loop.publish.remote(weights),
            "the generators taking the weights published before (rollout.timeout_s)",
            self._pool_timeout_s,
        )

    def start_probe(self) -> None:
        """See `protocols.Services`."""
        self._probe = self._wires.loop.answer.remote(
            self._probe_prompts, self._config.rollout.sampling, self._config.run.seed
        )

    def finish_probe(self) -> list[Rollout]:
        """See `protocols.Services`."""
        return _ask(self._probe, "the answers to validation.probe_prompts", self._pool_timeout_s)

    def samples(self, rollouts: Sequence[Rollout]) -> tuple[Sample, ...]:
        """See `protocols.Services`."""
        return tuple(
            Sample(
                prompt=prompt.text,
                reference=prompt.references[0],
                response=decode(self._tokenizer, rollout),
            )
            for prompt, rollout in zip(self._probe_prompts, rollouts, strict=True)
        )

    # ---- log -------------------------------------------------------------------------------------

    def report_step(self, train: TrainStep, facts: DrawFacts) -> None:
        """See `protocols.Services`."""
        if self._last_report is not None:
            _ask(self._last_report, "the log of the last step")
        self._last_report = self._wires.loop.report_step.remote(train, facts)

    def log(self, record: Record) -> None:
        """See `protocols.Services`."""
        _ask(self._wires.metrics.add.remote(record), "the log")

    def should_stop(self) -> bool:
        """See `protocols.Services`."""
        return _ask(self._wires.buffer.stop_requested.remote(), "the replay buffer")

    # ---- inside ----------------------------------------------------------------------------------

    @property
    def _pool_timeout_s(self) -> float:
        """Long enough for the pool to notice that a generator hangs, and to replace it."""
        run, rollout = self._config.run, self._config.rollout
        return GENERATOR_CALL_TIMEOUTS * rollout.timeout_s + run.startup_timeout_s + CALL_TIMEOUT_S

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
            for rollout_id, reference in _ask(call, f"target store {index}").items():
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
                _ask(self._wires.stores[index].drop.remote([rollout_id]), f"target store {index}")
        return targets


def _ask(call: Any, what: str, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    try:
        return ray.get(call, timeout=timeout_s)
    except GetTimeoutError as error:
        raise TimeoutError(f"no answer within {timeout_s:g} s: {what}") from error
    except RayTaskError as error:
        if isinstance(error.cause, UserError | BufferLost):
            raise error.cause from error
        raise
