"""The loop that every rank of the learner runs.

    prefetched batches ──► train_step ──► publish, if due ──► advance ──► validate, if due ──► log
           ▲                                                    │                              │
           └── draw(step + 1) waits for both ◄──────────────────┘        checkpoint, if due ◄──┘

`step` is 0-based, `completed = step + 1`, and a weight version is a number of completed steps.

The order of the parts matters:
- Weights are published before `advance`, which opens the demand that may ask for them, and before
  the validation, so that the generators already work while it runs.
- A checkpoint holds the state as of draw `completed`. Batches prefetched beyond it are dropped.
- A checkpoint is committed when the log has every step before it.
- When the cluster will take a node of the learners or the driver away, a checkpoint is written at
  once, and the ranks go on for as long as they have that node.

Rank 0 alone talks to the other roles. What it decides by their replies it tells the other ranks,
because a rank that leaves the loop alone would leave the others in a collective.

Where generators share the devices (`run.placement: colocated`), every rank lends its own while it
waits for samples, for responses, or for generators that go back to a checkpoint.

    wait                        ends when                               limit
    ------------------------    ------------------------------------    ----------------------------
    for a step's batches        all ranks have theirs, or the run is    `learner.data_timeout_s`,
                                asked to stop, or it has failed         counted while training only
    for a shared device         the generators' work has ended, and     `turn_limit_s`
                                their engines sleep
    for the probe's responses   the generators have responded           the pool's (`orchestrator`)
    for the other ranks         they reach the same collective          `collective_limit_s`, longer
                                                                        than the waits of rank 0
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from distillm_ray.batching import pack, plan_validation
from distillm_ray.cluster.learner import Links
from distillm_ray.config import Config
from distillm_ray.errors import ClusterError, UserError
from distillm_ray.learner.checkpoint import (
    LEARNER_FOLDER,
    Checkpoint,
    CheckpointDirectory,
    CheckpointMeta,
)
from distillm_ray.learner.prefetch import Prefetcher, PreparedStep
from distillm_ray.learner.self_check import describe_self_check
from distillm_ray.log.records import (
    CheckpointRecord,
    EventRecord,
    ProbeRecord,
    PublishRecord,
    Record,
    Sample,
    ValidationRecord,
)
from distillm_ray.log.stopping import ENDED_EARLY, why_stop
from distillm_ray.remote.run_store import store_of, upload_directory
from distillm_ray.run_directory import BEST_MODEL_FOLDER, MODEL_FOLDER
from distillm_ray.text_metrics import rouge
from distillm_ray.types import (
    TRAINING,
    LearnerBatch,
    Prompt,
    Rollout,
    TrainStep,
    Validation,
    Weights,
)

if TYPE_CHECKING:
    from distillm_ray.learner.learner import Learner

_POLL_S = 2.0  # interval at which run control is asked while batches are missing
_PACKING_S = 0.25  # for batches whose samples are there, before a shared device is lent


class TrainLoop:
    """One rank's loop.

    Args:
        validation_batches: this rank's share of the held-out responses.
        publish_dtype: dtype of the weights that the generators get.
        end_token_ids: at which the trained model ends its responses; written to the export.
        probe_prompts: held-out prompts whose responses go to the log.
        held_out_prompts: where there are no held-out responses, the prompts to which the student
            responds at each validation; the same on all ranks.
        decode: the text of a response.
    """

    def __init__(
        self,
        learner: Learner,
        links: Links,
        config: Config,
        checkpoints: CheckpointDirectory,
        *,
        validation_batches: Sequence[LearnerBatch],
        publish_dtype: torch.dtype,
        end_token_ids: Sequence[int],
        probe_prompts: Sequence[Prompt] = (),
        held_out_prompts: Sequence[Prompt] = (),
        decode: Callable[[Rollout], str] = lambda rollout: rollout.text,
    ) -> None:
        self._learner = learner
        self._links = links
        self._config = config
        self._checkpoints = checkpoints
        self._validation_batches = validation_batches
        self._publish_dtype = publish_dtype
        self._end_token_ids = end_token_ids
        self._probe_prompts = probe_prompts
        self._held_out_prompts = held_out_prompts
        self._decode = decode
        self._speaks = learner.rank == 0
        self._phi = 0.0
        self._validation: Validation | None = None
        self._rouge_l = math.nan  # of the newest validation, if its probes were scored
        self._skipped_in_a_row = 0
        self._waited_s = 0.0  # for samples, in training
        self._published = 0  # the generators loaded the student's directory: version 0
        self._saved = 0  # the step of the newest checkpoint
        self._nodes: frozenset[str] = frozenset()  # that learners or the driver are on
        self._warned = False
        self._checked_itself = False
        self._store = store_of(config)
        self._leads_node = self._speaks  # the first rank of its node

    def run(self, start: Checkpoint | None) -> int:
        """Run to the last step, to a rule of `stop` or to a stop request; returns `completed`.

        A run that has ended by itself leaves its model in `model/`, and its best one in
        `model-best/` if that is another one. Every end leaves a checkpoint. `start` is the
        checkpoint to resume from, the same on all ranks.

        Raises:
            ClusterError: the samples of a step did not come in time.
            RunDirectoryError: the disk is full at a checkpoint.
            UserError: too many non-finite steps in a row.
        """
        if self._learner.remark:
            self._log(EventRecord(name="student", detail=self._learner.remark))
        nodes = self._learner.collect(self._links.nodes)
        own = [of_rank[:1] for of_rank in nodes]
        self._leads_node = own.index(own[self._learner.rank]) == self._learner.rank
        completed = self._saved = self._begin(start)
        self._nodes = frozenset(node for of_rank in nodes for node in of_rank)
        total_steps = self._config.learner.num_steps
        rule = self._rule_that_ends()
        with self._prefetcher(completed) as prefetcher:
            while completed < total_steps and not rule:
                with self._noted("wait"):
                    prepared = self._await_batches(prefetcher, completed)
                if prepared is None:
                    break
                self._check_itself(prepared, completed)
                with self._doing(f"step {completed + 1}"):
                    train = self._learner.train_step(
                        prepared.batches, completed, wait_seconds=prepared.wait_seconds
                    )
                completed += 1
                self._after_step(prepared, train)
                rule = self._rule_that_ends()
                is_best = False
                at_end = completed == total_steps or bool(rule)
                if completed % self._config.validation.interval == 0 or at_end:
                    with self._doing("validate"):
                        self._validate(completed)
                    is_best = self._is_best(completed)
                    rule = rule or self._rule_that_ends()
                    at_end = at_end or bool(rule)
                if completed % self._config.checkpoint.interval == 0 or at_end or is_best:
                    self._save(completed)
        if self._saved < completed:
            self._save(completed)
        if completed == total_steps or rule:
            with self._doing("export"):
                self._finish(completed, rule if completed < total_steps else "")
        return completed

    # ---- the end ---------------------------------------------------------------------------------

    def _rule_that_ends(self) -> str:
        """The rule of `stop` that ends the run now; empty while it goes on, on all ranks."""
        stop = self._config.stop
        if not stop.is_set:
            return ""
        rule = ""
        if self._speaks:
            self._links.orchestrator.finish_report()
            rule = why_stop(stop, self._links.log.standing())
        (ends,) = self._learner.any_of(bool(rule))
        return rule or "a rule of stop" if ends else ""

    def _is_best(self, completed: int) -> bool:
        """Whether the validation just made is the best so far and has a checkpoint of its own."""
        if not self._config.checkpoint.at_best:
            return False
        best = self._speaks and self._links.log.standing().best_step == completed
        return self._learner.any_of(best)[0]

    def _finish(self, completed: int, rule: str) -> None:
        """Give the last weights to the evaluation, and write the models."""
        if self._config.evaluation.at_end and self._published != completed:
            self._publish(completed, wanted=True)
        directory = self._config.run.local_directory
        self._export(MODEL_FOLDER)
        best = self._learner.collect(self._checkpoints.best() if self._speaks else None)[0]
        if best is not None and best.meta.step != completed:
            self._load(best)
            self._export(BEST_MODEL_FOLDER)
            detail = f"{BEST_MODEL_FOLDER}/ is the student after step {best.meta.step}"
            self._log(EventRecord(step=completed, name="best student", detail=detail))
        elif self._speaks:
            shutil.rmtree(directory / BEST_MODEL_FOLDER, ignore_errors=True)
            if self._store is not None:
                self._store.delete(BEST_MODEL_FOLDER)
        if rule:
            self._log(EventRecord(step=completed, name=ENDED_EARLY, detail=rule))

    def _export(self, name: str) -> None:
        """Write the student into a folder of the run directory, and to its store."""
        directory = self._config.run.local_directory / name
        self._learner.export(directory, self._end_token_ids)
        if self._store is not None:
            with self._failing_together():
                if self._speaks:
                    upload_directory(self._store, directory, name)

    def _load(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint on all ranks, which their nodes have or fetch."""
        if self._checkpoints.in_store:
            with self._failing_together():
                if self._leads_node:
                    self._checkpoints.here(checkpoint)
        self._learner.load(checkpoint.learner_path)

    # ---- the parts of a step ---------------------------------------------------------------------

    def _begin(self, start: Checkpoint | None) -> int:
        """Bring learner, buffer and generators to the same step; returns it."""
        if start is None:
            with self._links.turn.lent():
                if self._speaks:
                    self._links.orchestrator.restore(None, 0)
            with self._doing("validate"):
                self._validate(0)
            return 0
        completed = start.meta.step
        self._load(start)
        self._phi, self._validation = start.meta.phi, start.meta.validation
        with self._links.turn.lent():
            if self._speaks:
                self._links.orchestrator.restore(start.buffer_state(), completed)
        self._publish(completed)
        self._log(EventRecord(step=completed, name="resumed", detail=start.path.name))
        return completed

    def _await_batches(self, prefetcher: Prefetcher, step: int) -> PreparedStep | None:
        """The batches of `step` as soon as every rank has its own; None if the run must end.

        A shared device is lent while batches are missing, and held again at the return of them.

        The notice that a node will be taken away is seen here, and answered by a checkpoint. Every
        rank checks for its batches and rank 0 asks run control; one collective shares both
        results with all ranks. So all ranks start a step or none does, and a stop request is
        noticed while samples are missing. Time counts as waiting, and against
        `learner.data_timeout_s`, in the training phase only: what comes before it may take longer
        than any step.
        """
        control, turn = self._links.control, self._links.turn
        prepared: PreparedStep | None = None
        waited_s, since = 0.0, time.monotonic()
        before_s = self._waited_s
        reason = ""
        early = False
        missing = True
        while True:
            poll_s = _PACKING_S if turn.shared and turn.held else _POLL_S
            prepared = prepared or prefetcher.poll(step, poll_s)
            if not missing:
                turn.ask()
            was_early, ends, early, leaves = early, False, False, False
            if self._speaks:
                reason = ""
                if prepared is None:
                    reason = self._links.buffer.waiting_for(step) or "the teacher targets"
                elif not turn.held:
                    reason = "the generators, which finish their work on the shared devices"
                status = control.wait_for(reason, self._waited_s)
                ends, early = status.ends, status.phase != TRAINING
                leaves = self._lose(status.leaving)
            missing, unheld, ends, early, leaves = self._learner.any_of(
                prepared is None, not turn.held, ends, early, leaves
            )
            now = time.monotonic()
            waited_s += 0.0 if early or was_early else now - since
            since = now
            self._waited_s = before_s + waited_s
            if ends:
                return None
            if leaves and self._saved < step:
                self._save(step)
                since = time.monotonic()
            if prepared is not None and not missing and not unheld:
                return dataclasses.replace(prepared, wait_seconds=waited_s)
            if not missing:
                continue  # the wait for a device has a limit of its own
            turn.lend()
            if waited_s > self._config.learner.data_timeout_s:
                raise ClusterError(
                    f"the samples of step {step} did not come within learner.data_timeout_s ="
                    f" {self._config.learner.data_timeout_s:g} s; waiting for"
                    f" {reason or 'another rank'}"
                )

    def _lose(self, leaving: frozenset[str]) -> bool:
        """Note which nodes of the run will be taken away; whether there is one more."""
        new = self._nodes & leaving
        self._nodes -= new
        if new:
            self._links.control.lose(new)
        for node in sorted(new):
            detail = f"node {node}, of learners or the driver, will be taken away"
            self._log(EventRecord(name="preemption", detail=detail))
        return bool(new)

    def _check_itself(self, prepared: PreparedStep, completed: int) -> None:
        """Prove on the first batch that the loss is 0 where the teacher equals the student.

        Raises:
            ModelError: it is not.
        """
        if self._checked_itself or not self._config.loss.needs_teacher:
            return
        self._checked_itself = True
        batches = prepared.batches
        compared = next((one for one in batches if one.targets is not None), batches[0])
        with self._doing("self-check"):
            largest = self._learner.self_check(compared)
        detail = describe_self_check(largest)
        self._log(EventRecord(step=completed, name="self-check", detail=detail))

    def _after_step(self, prepared: PreparedStep, train: TrainStep) -> None:
        completed = train.step
        self._phi = prepared.phi
        self._publish_if_due(completed)
        if self._speaks:
            self._links.reporter.tokens += train.tokens
            assert prepared.facts is not None, "only the rank that speaks gets the facts"
            self._links.buffer.advance(completed)
            self._links.orchestrator.report_step(train, prepared.facts)
        self._watch_gap(completed, train.logprob_gap)
        self._watch_skips(prepared, train)

    def _publish_if_due(self, completed: int) -> None:
        """Publish every `sync_interval` steps and after the last step, if there is demand.

        A demand asks for the newest multiple of `sync_interval` or a later version. Without demand
        that version was not published, so where phi leaves 0 the next step publishes.
        """
        interval = self._config.rollout.sync_interval
        newest = completed // interval * interval
        if completed == self._config.learner.num_steps:
            newest = completed
        if self._published < newest:
            self._publish(completed)

    def _publish(self, completed: int, *, wanted: bool = False) -> None:
        """Hand the weights over bucket by bucket, if any generator needs them."""
        if self._speaks and not wanted:
            config = self._config
            # The student is evaluated with the weights of the last step.
            evaluated = completed == config.learner.num_steps and config.evaluation.at_end
            wanted = evaluated or (config.wants_rollouts and self._links.buffer.wants_weights())
        (wanted,) = self._learner.any_of(wanted)
        if not wanted:
            return
        started = time.monotonic()
        with self._doing(f"publish version {completed}"):
            nbytes = self._hand_over(completed)
        self._published = completed
        seconds = time.monotonic() - started
        self._log(PublishRecord(step=completed, nbytes=nbytes, seconds=seconds))

    def _hand_over(self, version: int) -> int:
        """Gather the weights and tell the orchestrator where they are; returns their bytes."""
        references = []
        nbytes = 0
        for bucket in self._learner.gather_weights(self._publish_dtype):
            if self._speaks:
                nbytes += sum(values.nbytes for _, _, values in bucket.values())
                references.append(self._links.orchestrator.put(bucket))
        if self._speaks:
            self._links.orchestrator.publish(
                Weights(
                    version=version,
                    buckets=tuple(references),
                    nbytes=nbytes,
                    adapters=self._learner.adapter_base(self._publish_dtype),
                )
            )
        return nbytes

    def _validate(self, completed: int) -> None:
        """Compute the held-out loss, adapt the schedule, and let the student respond to probes."""
        scoring = self._config.validation.metric == "rouge_l"
        self._rouge_l = math.nan
        if (self._held_out_prompts or scoring) and self._published != completed:
            self._publish(completed, wanted=True)
        started = time.monotonic()  # a publish has its own record
        probing = (
            not self._held_out_prompts
            and self._published == completed
            and (self._config.wants_rollouts or scoring)
            and len(self._probe_prompts) > 0
        )
        if probing and self._speaks:
            # Before the validation, so that the generators work while the learners compute it.
            self._links.orchestrator.start_probe(self._probe_prompts)
        if self._held_out_prompts:
            loss_sum, num_tokens = self._own_text_loss(completed)
        else:
            loss_sum, num_tokens = self._learner.validation_loss(self._validation_batches)
        loss = loss_sum / num_tokens if num_tokens else math.nan
        self._validation = Validation(step=completed, loss=loss, tokens=num_tokens)
        if self._speaks:
            self._phi = self._links.buffer.report(self._validation)
        self._log(
            ValidationRecord(
                step=completed,
                loss=loss,
                text="student" if self._held_out_prompts else "dataset",
                tokens=num_tokens,
                phi=self._phi,
                seconds=time.monotonic() - started,
            )
        )
        self._publish_if_due(completed)  # phi may have left 0 in this validation
        if probing:
            self._finish_probe(completed)

    def _own_text_loss(self, completed: int) -> tuple[float, int]:
        """The divergence on the student's responses to held-out prompts, summed, and its tokens."""
        responses = None
        if self._speaks:
            self._links.orchestrator.start_probe(self._held_out_prompts)
        with self._links.turn.lent():
            if self._speaks:
                responses = self._links.orchestrator.finish_probe()
        rollouts = self._learner.collect(responses)[0]
        assert rollouts is not None, "rank 0 has the responses"
        plans = plan_validation(
            rollouts,
            num_ranks=self._learner.num_ranks,
            max_micro_batch_tokens=self._config.learner.max_micro_batch_tokens,
        )[self._learner.rank]
        targets = None
        if self._links.targets is not None:
            mine = {one.rollout.rollout_id: one.rollout for plan in plans for one in plan.sequences}
            targets = self._links.targets.fetch(list(mine.values()))
        shown = zip(self._probe_prompts, rollouts, strict=False)
        samples = tuple(self._sample(prompt, rollout) for prompt, rollout in shown)
        self._log(ProbeRecord(step=completed, samples=samples))
        return self._learner.own_text_loss([pack(plan, targets) for plan in plans])

    def _sample(self, prompt: Prompt, rollout: Rollout) -> Sample:
        reference = prompt.references[0] if prompt.references else ""
        return Sample(prompt=prompt.text, reference=reference, response=self._decode(rollout))

    def _finish_probe(self, completed: int) -> None:
        """Log the responses, and compare the engine's log-probabilities with the learner's."""
        with self._links.turn.lent():
            responses = self._links.orchestrator.finish_probe() if self._speaks else None
        rollouts = self._learner.collect(responses)[0]
        assert rollouts is not None, "rank 0 has the responses"
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
        samples = tuple(
            self._sample(prompt, rollout)
            for prompt, rollout in zip(self._probe_prompts, rollouts, strict=True)
        )
        self._rouge_l = _mean_rouge_l(self._probe_prompts, samples)
        self._log(
            ProbeRecord(step=completed, samples=samples, logprob_gap=gap, rouge_l=self._rouge_l)
        )
        self._watch_gap(completed, gap)

    def _watch_gap(self, completed: int, gap: float) -> None:
        """Warn once where the engine's log-probabilities are not the learner's."""
        limit = self._config.rollout.logprob_warning
        if self._warned or not gap > limit:  # NaN: nothing was compared
            return
        self._warned = True
        detail = (
            f"mean |engine - learner| is {gap:.3f} nats under the same weights, above"
            f" rollout.logprob_warning = {limit:g}: the student outputs that are trained on come"
            " from a slightly different distribution than the student's; check rollout.dtype"
        )
        self._log(EventRecord(step=completed, name="log-probabilities differ", detail=detail))

    def _save(self, completed: int) -> None:
        """Write the checkpoint of `completed`. On a full disk the checkpoints before it stay."""
        with self._doing("checkpoint"):
            self._write_checkpoint(completed)
        self._saved = completed

    def _write_checkpoint(self, completed: int) -> None:
        started = time.monotonic()
        checkpoints = self._checkpoints
        in_store = checkpoints.in_store  # then every node has a directory of its own
        writes = self._leads_node if in_store else self._speaks
        with self._failing_together():
            if writes:
                checkpoints.prepare(completed)
        # A rank that fails inside DeepSpeed's save cannot tell the others, which wait for it there.
        # It fails alone, reports to run control, and the driver ends the job.
        with checkpoints.removing_partial_on_failure(completed):
            self._learner.save(checkpoints.partial_path(completed) / LEARNER_FOLDER)
        self._learner.barrier()  # a rank's last files are written after DeepSpeed's own barrier
        sees = {} if in_store and not writes else checkpoints.written(completed)
        written = self._learner.collect(sees)
        if in_store:
            with self._failing_together():
                if writes:
                    checkpoints.upload(completed)
        if self._speaks and self._links.targets is not None:
            self._links.targets.start_flush()
        with self._failing_together():
            if self._speaks:
                now = self._validation is not None and self._validation.step == completed
                scored = now and not math.isnan(self._rouge_l)
                meta = CheckpointMeta(
                    step=completed,
                    phi=self._phi,
                    validation=self._validation,
                    rouge_l=self._rouge_l if scored else None,
                )
                state = self._links.buffer.state(completed)
                self._links.orchestrator.finish_report()
                path = checkpoints.commit(meta, state, written).path
                seconds = time.monotonic() - started
                self._log(CheckpointRecord(step=completed, path=path.name, seconds=seconds))

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Raise a user's error of one rank on all ranks: the others would wait for it forever."""
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
        path = self._config.run.local_directory / f"non_finite_step_{train.step:08d}.json"
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

    @contextmanager
    def _doing(self, name: str) -> Iterator[None]:
        """Work of this rank: it counts as busy, and is noted."""
        with self._links.reporter.busy.running(), self._noted(name):
            yield

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        """A slice of the timeline, where this rank speaks."""
        if not self._speaks:
            yield
            return
        with self._links.reporter.timeline.slice("learner", "rank 0", name):
            yield

    def _log(self, record: Record) -> None:
        if self._speaks:
            self._links.log.add(record)

    def _prefetcher(self, completed: int) -> Prefetcher:
        config = self._config.learner
        return Prefetcher(
            self._links.buffer,
            self._links.targets,
            rank=self._learner.rank,
            first_step=completed,
            total_steps=config.num_steps,
            depth=config.prefetch_steps,
        )


def _mean_rouge_l(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> float:
    """Over the prompts that have a reference; NaN if none has."""
    pairs = [
        (sample.response, prompt.references)
        for prompt, sample in zip(prompts, samples, strict=True)
        if prompt.references
    ]
    if not pairs:
        return math.nan
    responses, references = zip(*pairs, strict=True)
    return float(rouge(responses, references)["rouge_l"].mean())
