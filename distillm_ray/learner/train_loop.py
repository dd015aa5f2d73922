"""The loop that every rank of the learner runs.

    prefetched batches ──► train_step ──► publish, if due ──► advance ──► validate, if due ──► log
           ▲                                                    │                              │
           └── draw(step + 1) waits for both ◄──────────────────┘        checkpoint, if due ◄──┘

`step` is 0-based, `completed = step + 1`, and a weight version is a number of completed steps.
The weights go out before `advance`, which opens the demand that may ask for them, and before the
validation, during which the generators already work on it. Rank 0 speaks for all ranks to the
services; whatever it decides by their answers, it tells the others. A checkpoint holds the state
as of draw `completed`; what was prefetched beyond it is dropped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from distillm_ray.batching import pack, plan_validation
from distillm_ray.config import Config
from distillm_ray.errors import UserError
from distillm_ray.learner.checkpoint import (
    LEARNER_FOLDER,
    Checkpoint,
    CheckpointDirectory,
    CheckpointMeta,
)
from distillm_ray.learner.prefetch import Prefetcher, PreparedStep
from distillm_ray.learner.protocols import LearnerRank, Services
from distillm_ray.log.records import (
    CheckpointRecord,
    EventRecord,
    ProbeRecord,
    PublishRecord,
    Record,
    ValidationRecord,
)
from distillm_ray.run_directory import CHECKPOINT_FOLDER, MODEL_FOLDER
from distillm_ray.types import LearnerBatch, Rollout, TrainStep, Validation, Weights


def train_loop(
    services: Services,
    learner: LearnerRank,
    config: Config,
    *,
    validation_batches: Sequence[LearnerBatch],
    publish_dtype: torch.dtype,
    start: Checkpoint | None,
) -> int:
    """Run until `learner.steps` are completed or the job is asked to stop; returns `completed`.

    A finished run leaves its model in `model/`; every end leaves a checkpoint. `start` is the
    checkpoint to go on from, the same on all ranks.

    Raises:
        ClusterError: the samples of a step did not come in time.
        RunDirectoryError: the disk is full at a checkpoint.
        UserError: too many non-finite steps in a row.
    """
    loop = _TrainLoop(services, learner, config, validation_batches, publish_dtype)
    return loop.run(start)


class _TrainLoop:
    def __init__(
        self,
        services: Services,
        learner: LearnerRank,
        config: Config,
        validation_batches: Sequence[LearnerBatch],
        publish_dtype: torch.dtype,
    ) -> None:
        self._services = services
        self._learner = learner
        self._config = config
        self._validation_batches = validation_batches
        self._publish_dtype = publish_dtype
        self._checkpoints = CheckpointDirectory(
            config.run.directory / CHECKPOINT_FOLDER, keep=config.checkpoint.keep
        )
        self._speaks = learner.rank == 0
        self._phi = 0.0
        self._validation: Validation | None = None
        self._skipped_in_a_row = 0
        self._published = 0  # the generators have loaded the same model directory
        self._warned = False

    def run(self, start: Checkpoint | None) -> int:
        completed = self._begin(start)
        total_steps = self._config.learner.steps
        stopping = False
        saved = completed
        with self._prefetcher(completed) as prefetcher:
            while completed < total_steps and not stopping:
                prepared = prefetcher.get(completed)
                train = self._learner.train_step(
                    prepared.batches, completed, wait_seconds=prepared.wait_seconds
                )
                completed += 1
                self._after_step(prepared, train)
                at_end = completed == total_steps
                if completed % self._config.validation.interval == 0 or at_end:
                    self._validate(completed)
                stopping = self._learner.agree(self._speaks and self._services.should_stop())
                if completed % self._config.checkpoint.interval == 0 or at_end or stopping:
                    self._save(completed)
                    saved = completed
        assert saved == completed, "every end leaves a checkpoint"
        if completed == total_steps:
            self._learner.export(self._config.run.directory / MODEL_FOLDER)
        return completed

    # ---- the parts of a step ---------------------------------------------------------------------

    def _begin(self, start: Checkpoint | None) -> int:
        """Bring learner, buffer and generators to the same step; returns it."""
        if start is None:
            if self._speaks:
                self._services.restore_buffer(None, 0)
            self._validate(0)
            return 0
        completed = start.meta.step
        self._learner.load(start.learner_path)
        self._phi, self._validation = start.meta.phi, start.meta.validation
        if self._speaks:
            self._services.restore_buffer(start.buffer_state(), completed)
        self._publish(completed)
        self._log(EventRecord(step=completed, name="resumed", detail=start.path.name))
        return completed

    def _after_step(self, prepared: PreparedStep, train: TrainStep) -> None:
        completed = train.step
        self._phi = prepared.facts.phi
        self._publish_if_due(completed)
        if self._speaks:
            self._services.advance(completed)
            self._services.report_step(train, prepared.facts)
        self._watch_gap(completed, train.logprob_gap)
        self._watch_skips(prepared, train)

    def _publish_if_due(self, completed: int) -> None:
        """Every `sync_interval` steps and after the last; late where nobody wanted them then.

        A demand starts with the newest multiple of `sync_interval` or later: where phi leaves 0,
        the weights that it asks for were never published.
        """
        interval = self._config.rollout.sync_interval
        newest = completed // interval * interval
        if completed == self._config.learner.steps:
            newest = completed
        if self._published < newest:
            self._publish(completed)

    def _publish(self, completed: int) -> None:
        """Hand the weights over bucket by bucket, if anyone needs them."""
        wanted = self._speaks and self._services.wants_weights(completed)
        if not self._learner.agree(wanted):
            return
        started = time.monotonic()
        references = []
        nbytes = 0
        for bucket in self._learner.gather_weights(self._publish_dtype):
            if self._speaks:
                nbytes += sum(values.nbytes for _, _, values in bucket.values())
                references.append(self._services.put_bucket(bucket))
        if self._speaks:
            self._services.publish(
                Weights(version=completed, buckets=tuple(references), nbytes=nbytes)
            )
        self._published = completed
        seconds = time.monotonic() - started
        self._log(PublishRecord(step=completed, nbytes=nbytes, seconds=seconds))

    def _validate(self, completed: int) -> None:
        started = time.monotonic()
        probing = self._published == completed and self._config.wants_rollouts
        probing = probing and self._config.validation.probe_prompts > 0
        if probing and self._speaks:
            self._services.start_probe()
        loss_sum, num_tokens = self._learner.validation_loss(self._validation_batches)
        loss = loss_sum / num_tokens if num_tokens else math.nan
        self._validation = Validation(step=completed, loss=loss, tokens=num_tokens)
        if self._speaks:
            self._phi = self._services.report_validation(self._validation)
        self._log(
            ValidationRecord(
                step=completed,
                loss=loss,
                tokens=num_tokens,
                phi=self._phi,
                seconds=time.monotonic() - started,
            )
        )
        self._publish_if_due(completed)  # phi may have left 0 just now
        if probing:
            self._finish_probe(completed)

    def _finish_probe(self, completed: int) -> None:
        """What the student says now, and how far engine and learner are apart on it."""
        answers = self._services.finish_probe() if self._speaks else None
        rollouts: list[Rollout] = self._learner.collect(answers)[0]
        (plans,) = plan_validation(
            rollouts,
            num_ranks=1,
            max_micro_batch_tokens=self._config.learner.max_micro_batch_tokens,
        )
        gaps = []
        for plan in plans:
            batch = pack(plan, None)
            assert batch.behaviour_logprobs_N is not None
            gaps.append(np.abs(self._learner.token_logprobs(batch) - batch.behaviour_logprobs_N))
        gap = float(np.concatenate(gaps).mean())
        if self._speaks:
            samples = self._services.samples(rollouts)
            self._log(ProbeRecord(step=completed, samples=samples, logprob_gap=gap))
        self._watch_gap(completed, gap)

    def _watch_gap(self, completed: int, gap: float) -> None:
        """Warn once where the engine's log-probabilities are not the learner's."""
        limit = self._config.rollout.logprob_warning
        if self._warned or not gap > limit:
            return
        self._warned = True
        detail = (
            f"mean |engine - learner| is {gap:.3f} nats under the same weights, above"
            f" rollout.logprob_warning = {limit:g}: what is trained on as the student's output is"
            " not quite its own; check rollout.dtype"
        )
        self._log(EventRecord(step=completed, name="log-probabilities differ", detail=detail))

    def _save(self, completed: int) -> None:
        """Write the checkpoint of `completed`. Without space, the ones before it stay good."""
        started = time.monotonic()
        checkpoints = self._checkpoints
        with self._failing_together():
            if self._speaks:
                checkpoints.prepare(completed)
        # A rank that fails here cannot tell the others, which wait for it inside of DeepSpeed: it
        # fails alone, its worker tells the driver, and the driver ends the job.
        with checkpoints.removing_partial_on_failure(completed):
            self._learner.save(checkpoints.partial_path(completed) / LEARNER_FOLDER)
        with self._failing_together():
            if self._speaks:
                meta = CheckpointMeta(
                    step=completed,
                    phi=self._phi,
                    validation=self._validation,
                )
                path = checkpoints.commit(meta, self._services.buffer_state(completed)).path
                seconds = time.monotonic() - started
                self._log(CheckpointRecord(step=completed, path=path.name, seconds=seconds))

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """A rank that fails by a user's error tells the others, which would wait for it forever."""
        failure: UserError | None = None
        try:
            yield
        except UserError as error:
            failure = error
        for message in self._learner.collect(str(failure) if failure else None):
            if failure is not None:
                raise failure
            if message is not None:
                raise UserError(message)

    def _watch_skips(self, prepared: PreparedStep, train: TrainStep) -> None:
        """Stop a run whose steps are non-finite one after the other.

        Raises:
            UserError: more than `learner.max_skipped_steps` in a row; names the file with the ids.
        """
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if train.skipped else 0
        limit = self._config.learner.max_skipped_steps
        if self._skipped_in_a_row <= limit:
            return
        ids = [list(batch.rollout_ids) for batch in prepared.batches]
        ids_by_rank = self._learner.collect(ids)
        path = self._config.run.directory / f"non_finite_step_{train.step:08d}.json"
        if self._speaks:
            path.parent.mkdir(parents=True, exist_ok=True)
            report = {
                "train": dataclasses.asdict(train),
                "rollout_ids_by_rank": ids_by_rank,
            }
            path.write_text(json.dumps(report, indent=2))
        raise UserError(
            f"loss or gradient was not finite in {self._skipped_in_a_row} steps in a row, more"
            f" than learner.max_skipped_steps = {limit}, the last one step {train.step}: the"
            f" parameters stayed as they were before; the ids of its samples are in {path};"
            " lower learner.learning_rate, or look at these samples"
        )

    # ---- helpers ---------------------------------------------------------------------------------

    def _log(self, record: Record) -> None:
        if self._speaks:
            self._services.log(record)

    def _prefetcher(self, completed: int) -> Prefetcher:
        config = self._config.learner
        return Prefetcher(
            self._services,
            rank=self._learner.rank,
            first_step=completed,
            total_steps=config.steps,
            depth=config.prefetch_steps,
            timeout_s=config.data_timeout_s,
            with_targets=self._config.loss.needs_teacher,
        )
