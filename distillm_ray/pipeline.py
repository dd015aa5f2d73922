"""The job on a cluster, from start to end. Read this file first.

    preflight ──► connect ──► data ──┬─► generators, scorers ──► evaluate the student ──────────┐
                                     └─► learners ──► validate the student ─────────────────────┤
                                                                                       training │
    report ◄── evaluate student and teacher ◄── learners and orchestrator, to the last step ◄───┘

Learners that share their GPUs with generators start when the student has been evaluated.

The driver moves no data: it starts actors, follows the log and watches the run. Learners pull
samples from the replay buffer, the orchestrator pulls work from it; nothing calls the driver.

    wait                        ends when                            limit
    ------------------------    ---------------------------------    -------------------------------
    for data                    all rows are tokenized               `run.startup_timeout_s` without
                                                                     any progress
    for actors to start         all models are loaded                2 x `run.startup_timeout_s`
    for an evaluation           all responses are there              by waves of requests
    for training                the learners' group has ended        none: follows from the steps

Every wait also ends with a stop request (SIGTERM, SIGINT) or a failure, noticed twice a second.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import ray
import torch
from ray.exceptions import RayActorError, RayError
from transformers import PreTrainedTokenizerBase

from distillm_ray.cluster import placement
from distillm_ray.cluster.actors import ask, one_line, release
from distillm_ray.cluster.buffer import start_buffer
from distillm_ray.cluster.connection import available, connect, is_free, resolve_device
from distillm_ray.cluster.control import ControlClient, start_control
from distillm_ray.cluster.learner import LearnerGroup, LearnerJob, Wires
from distillm_ray.cluster.log import LogClient, start_log
from distillm_ray.cluster.orchestrator import (
    TrainingPeers,
    publish_limit_s,
    start_orchestrator,
)
from distillm_ray.cluster.rollout import GeneratorStarter
from distillm_ray.cluster.shared_gpus import SharedGpus
from distillm_ray.cluster.targets import ScorerStarter, flush_stores, start_stores
from distillm_ray.config import Config
from distillm_ray.config.files import dump_config
from distillm_ray.data import ray_data
from distillm_ray.data.fingerprint import keep_or_compare
from distillm_ray.data.splits import Splits, splits_of
from distillm_ray.errors import ClusterError, ConfigError, RunFailed, UserError
from distillm_ray.evaluation.responder import Responder
from distillm_ray.evaluation.results import (
    STUDENT_AFTER,
    TEACHER,
    Evaluation,
    read_evaluation,
)
from distillm_ray.evaluation.run_evaluator import RunEvaluator
from distillm_ray.files import write_atomically
from distillm_ray.learner import worker
from distillm_ray.learner.checkpoint import Checkpoint, CheckpointDirectory
from distillm_ray.learner.offload import check_offload
from distillm_ray.log.commit import package_commit
from distillm_ray.log.records import DoneRecord, EventRecord
from distillm_ray.log.stopping import has_ended
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.tokenizers import load_tokenizer
from distillm_ray.preflight import Preflight, check_run_directory, missing_evaluations
from distillm_ray.remote.inputs import fetched
from distillm_ray.remote.run_store import RunSession
from distillm_ray.report.console import ConsoleView
from distillm_ray.report.opening import opening_lines
from distillm_ray.report.rows import write_first_rows
from distillm_ray.rollout.generator import student_job
from distillm_ray.run_directory import CONFIG_FILE, held
from distillm_ray.teacher.target_library import library_settings
from distillm_ray.teacher.target_sizes import (
    TargetSizes,
    bytes_per_token,
    check_room,
    target_sizes,
    with_room,
)
from distillm_ray.teacher.target_store import most_fetched
from distillm_ray.types import TRAINING, Device
from distillm_ray.watch import Stopped, Watch

Status: TypeAlias = Literal["complete", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a job ended that did not fail."""

    status: Status
    step: int  # of the newest checkpoint; 0 if there is none


def train(
    config: Config,
    preflight: Preflight,
    view: ConsoleView,
    *,
    command: str,
    session: RunSession | None = None,
) -> Ended:
    """Run or resume the job. `session`: of a run directory in a store.

    Raises:
        UserError: a message for the user.
        RunFailed: restarts did not fix it; the last checkpoint is intact.
    """
    watch = Watch(view, check=session.check if session is not None else None)
    weights = weights_in_transit(config, preflight)
    with watch.phase("connecting to Ray"):
        connect(config, weights_bytes=weights, metrics_port=_metrics_port(config, view))
        device = resolve_device(config)
        check_offload(config.learner, device)
        phases = placement.train_phases(config, device, weights_bytes=weights)
        placement.check(phases, available())
    tokenizer = load_tokenizer(
        fetched(config.student.model), trust_remote_code=config.student.trust_remote_code
    )
    with watch.signals():
        try:
            with watch.phase("reading data"):
                splits = watch.wait_for(
                    lambda: splits_of(
                        config,
                        tokenizer,
                        map_files=ray_data.mapper(stall_timeout_s=config.run.startup_timeout_s),
                        vocabulary_size=preflight.vocabulary_size,
                    )
                )
                config = config.with_rows(len(splits.train.prompts))
                written = config  # without the size of the stores, which is this cluster's
                view.expect(config.learner.num_steps)
                _check_metric(config, splits)
                for line in opening_lines(config, splits, tokenizer):
                    view.note(line)
                if (sizes := _target_sizes(config, preflight, splits, device)) is not None:
                    config = _with_room(config, preflight, sizes, device)
                    view.note(check_room(config, sizes))
        except Stopped:
            return Ended(status="stopped", step=_checkpointed(config))
        config.run.local_directory.mkdir(parents=True, exist_ok=True)
        with held(config.run.local_directory):
            # Checked again: another job may have used the directory until now.
            resume_from = check_run_directory(config)
            write_atomically(
                config.run.local_directory / CONFIG_FILE, dump_config(written).encode()
            )
            keep_or_compare(config.run.local_directory, splits, resumed=resume_from is not None)
            ends = preflight.student.ends(splits.train.end_token_id)
            for line in write_first_rows(config.run.local_directory, splits, tokenizer, ends):
                view.note(line)
            if session is not None:
                session.push()  # before the first checkpoint: without a config it is no run's
            run = Run(
                config,
                preflight,
                splits,
                resume_from,
                device,
                command=command,
                started=watch.started_at,
                lease=session.token if session is not None else "",
            )
            watch.control, watch.log = ControlClient(run.control), LogClient(run.log)
            with watch.reporter.start(run.log):
                return _work(run, watch, tokenizer)


def _work(run: Run, watch: Watch, tokenizer: PreTrainedTokenizerBase) -> Ended:
    """The phases after the roles were made."""
    config, directory = run.config, run.config.run.local_directory
    evaluator = RunEvaluator(config, run.splits, tokenizer, run.device, watch.interrupt)
    responder = Responder(
        orchestrator=run.orchestrator,
        pool=config.rollout,
        startup_timeout_s=config.run.startup_timeout_s,
        tokenizer=tokenizer,
        interrupt=watch.interrupt,
    )
    status: Status = "stopped"
    try:
        # Engines measure the memory of their GPU as they start: a learner on it comes later.
        group = watch.group = None if config.is_colocated else run.start_learners()
        with watch.phase("starting generators, scorers and learners"):
            ask(
                run.orchestrator.start.remote(),
                "generators and scorers that start (twice run.startup_timeout_s)",
                timeout_s=2 * config.run.startup_timeout_s,
                interrupt=watch.interrupt,
            )
        evaluation = read_evaluation(directory) if run.resume_from else None
        if evaluation is None and evaluator.prompts:
            with watch.phase("evaluating the student before training"):
                evaluation = evaluator.before(responder)
                evaluation.write(directory)
        if group is None:
            group = watch.group = run.start_learners()
        with watch.phase(TRAINING):
            watch.follow(group, run.orchestrator, run.log, last_weights_s=publish_limit_s(config))
        run.keep_targets(watch.view)
        completed = _checkpointed(config)
        if has_ended(config, completed):
            watch.group = None  # it has ended as it should
            if evaluation is not None:
                evaluation = evaluation.of_step(completed)
                actors = (*run.generators, *run.scorers)
                trained = Trained(responder, completed, actors, run.shared)
                _evaluate(config, run.preflight, watch, evaluator, evaluation, trained)
            status = "complete"
    except Stopped:
        pass
    except RayActorError as error:
        raise RunFailed(
            f"the process of a coordinating role died ({one_line(error)}). The logs of the driver's"
            " node have the details; the same command resumes from the last checkpoint"
        ) from error
    ended = Ended(status=status, step=_checkpointed(config))
    record = DoneRecord(
        step=ended.step,
        status=status,
        seconds=watch.elapsed_s,
        phase_seconds=watch.phase_seconds,
    )
    log = LogClient(run.log)
    watch.reporter.send()  # calls of one process arrive in order
    log.add(record)
    watch.view.update(record)
    log.close()
    return ended


def evaluate_missing(config: Config, preflight: Preflight, view: ConsoleView) -> None:
    """Evaluate what the end of a complete run could not evaluate.

    Raises:
        UserError: a message for the user.
    """
    evaluation = read_evaluation(config.run.local_directory)
    assert evaluation is not None
    watch = Watch(view)
    with watch.phase("connecting to Ray"):
        connect(config)
        device = resolve_device(config)
        placement.check(placement.train_phases(config, device), available())
    tokenizer = load_tokenizer(
        fetched(config.student.model), trust_remote_code=config.student.trust_remote_code
    )
    with watch.signals(), held(config.run.local_directory):
        try:
            with watch.phase("reading data"):
                splits = watch.wait_for(
                    lambda: splits_of(
                        config,
                        tokenizer,
                        map_files=ray_data.mapper(stall_timeout_s=config.run.startup_timeout_s),
                        vocabulary_size=preflight.vocabulary_size,
                        with_corpus=False,
                    )
                )
            config = config.with_rows(len(splits.train.prompts))
            keep_or_compare(config.run.local_directory, splits, resumed=True)
            evaluator = RunEvaluator(config, splits, tokenizer, device, watch.interrupt)
            evaluation = evaluation.of_step(_checkpointed(config))
            _evaluate(config, preflight, watch, evaluator, evaluation, None)
        except Stopped:
            view.note("stopped before the evaluation was done; the same command does it")


@dataclass(frozen=True, slots=True)
class Trained:
    """The generators that hold the trained student, and all actors to free after their use."""

    responder: Responder
    step: int  # the version of its weights
    actors: tuple[Any, ...]  # besides those that elastic pools have added

    shared: SharedGpus | None  # the generators' places, where learners shared them

    def release(self) -> None:
        """End generators and scorers, and return their CPUs and GPUs."""
        # Those added end with an orchestrator that is gone.
        with contextlib.suppress(RayError, ClusterError):
            ask(self.responder.orchestrator.release_added.remote(), "the orchestrator")
        release(self.actors)
        if self.shared is not None:
            self.shared.remove()


def _evaluate(
    config: Config,
    preflight: Preflight,
    watch: Watch,
    evaluator: RunEvaluator,
    evaluation: Evaluation,
    trained: Trained | None,
) -> None:
    """Score what `evaluation` lacks. A failure costs an evaluation, never the trained student."""
    directory = config.run.local_directory

    def attempt(name: str, score: Callable[[Evaluation], Evaluation | None]) -> bool:
        nonlocal evaluation
        try:
            with watch.phase(f"evaluating the {name}"):
                found = score(evaluation)
        except (UserError, RunFailed, RayError) as error:
            watch.view.note(f"warning: the evaluation of the {name} failed: {one_line(error)}")
            return False
        if found is not None:
            evaluation = found
            evaluation.write(directory)
        return found is not None

    if STUDENT_AFTER not in evaluation.models:
        done = trained is not None and attempt(
            "student after training",
            lambda known: evaluator.after(trained.responder, known, version=trained.step),
        )
        if trained is not None:
            trained.release()
        if not done:
            steps = _checkpointed(config)
            attempt("exported student", lambda known: evaluator.exported(known, version=steps))
    teacher = preflight.teacher
    if teacher is not None and config.evaluates_teacher and TEACHER not in evaluation.models:
        attempt("teacher", lambda known: evaluator.teacher(known, teacher))
    if missing := missing_evaluations(config):
        watch.view.note(
            f"the run is complete, but the evaluation of {' and '.join(missing)} is missing: the"
            " same command tries it again"
        )


def _target_sizes(
    config: Config, preflight: Preflight, splits: Splits, device: Device
) -> TargetSizes | None:
    """How large the teacher targets are; None without a teacher."""
    if config.teacher is None or preflight.teacher is None or not config.loss.needs_teacher:
        return None
    dtype = config.teacher.dtype
    if dtype == "auto" and (device == "cuda" or resolve_dtype(dtype, device) == torch.bfloat16):
        # Of a CPU cluster, the driver's processor stands for all; scorers alone know for certain.
        dtype = "bfloat16"
    each = bytes_per_token(
        config.targets,
        dtype=dtype,
        hidden_size=preflight.teacher.hidden_size,
        vocabulary_size=preflight.vocabulary_size,
    )
    corpus = splits.corpus.pieces if splits.corpus else ()
    return target_sizes(config, splits.train.demonstrations, corpus, each)


def _with_room(config: Config, preflight: Preflight, sizes: TargetSizes, device: Device) -> Config:
    """The config with a size for its target stores.

    Raises:
        ClusterError: the object store of a node is too small.
    """

    def phases(config: Config) -> tuple[placement.Phase, ...]:
        return placement.train_phases(
            config,
            device,
            weights_bytes=weights_in_transit(config, preflight),
            batch_bytes=sizes.step * (config.learner.prefetch_steps + 1),
        )

    offered = available()
    training = phases(config)[0]
    config = with_room(config, sizes, placement.room_for_targets(training, offered.nodes))
    placement.check(phases(config), offered)
    return config


def _metrics_port(config: Config, view: ConsoleView) -> int | None:
    """`run.metrics_port`, or None: on a cluster that is there, and where the port is in use."""
    port = config.run.metrics_port
    if port is None:
        return None
    if os.environ.get("RAY_ADDRESS"):
        view.note(
            f"warning: run.metrics_port = {port} has no effect on a cluster that is there already:"
            " its nodes serve at `ray start --metrics-export-port`"
        )
        return None
    if is_free(port):
        return port
    view.note(
        f"warning: run.metrics_port = {port} is in use by another process, possibly of a run that"
        " was killed; this run starts without serving metrics"
    )
    return None


def weights_in_transit(config: Config, preflight: Preflight) -> int:
    """Bytes of published weights on one node: a version, and the one before it.

    `auto` counts as float32, the larger one.
    """
    width = 2 if config.rollout.dtype == "bfloat16" else 4
    return 2 * width * preflight.student.num_parameters


def _check_metric(config: Config, splits: Splits) -> None:
    """Refuse to compare checkpoints by responses that have no reference.

    Raises:
        ConfigError: none of the prompts to be scored has one.
    """
    prompts = splits.validation.prompts[: config.validation.probe_prompts]
    if config.validation.metric == "rouge_l" and not any(one.references for one in prompts):
        raise ConfigError(
            f"validation.metric must be loss, got rouge_l: none of the first {len(prompts)}"
            " held-out rows has a response to compare with"
        )


def _checkpointed(config: Config) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    latest = CheckpointDirectory.of(config).latest()
    return latest.meta.step if latest is not None else 0


class Run:
    """The actors of one training run."""

    def __init__(
        self,
        config: Config,
        preflight: Preflight,
        splits: Splits,
        resume_from: Checkpoint | None,
        device: Device,
        *,
        command: str,
        started: float,
        lease: str = "",
    ) -> None:
        """Start all of them but the learners; models are loaded later, by `orchestrator.start`.

        `started`: the driver's start, in seconds since the epoch.
        """
        self.config = config
        self.preflight = preflight
        self.splits = splits
        self.resume_from = resume_from
        self.device: Device = device
        self._lease = lease
        self.log = start_log(
            config,
            resume_step=resume_from.meta.step if resume_from else None,
            commit=package_commit(),
            command=command,
            started=started,
        )
        self.control = start_control()
        self.control.report_to.remote(self.log, "control")
        self._buffer = start_buffer(config)
        self._buffer.report_to.remote(self.log, "buffer")
        self.generators, generator_starter = [], None
        self.shared: SharedGpus | None = None
        if config.wants_generators:
            end_token_id = splits.train.end_token_id
            job = student_job(config, preflight.student, end_token_id=end_token_id, device=device)
            spec = placement.generators(config, device)
            if config.is_colocated:
                self.shared = SharedGpus(spec)
            generator_starter = GeneratorStarter(
                spec=spec, config=config.rollout, job=job, shared=self.shared
            )
            self.generators = generator_starter.start()
        self.scorers, self._stores, scorer_starter = [], [], None
        self._identity = preflight.target_identity(config, device)
        if self._identity is not None:
            assert config.teacher is not None
            scorer_starter = ScorerStarter(
                spec=placement.scorers(config, device),
                teacher=config.teacher,
                targets=config.targets,
                vocabulary_size=preflight.vocabulary_size,
                device=device,
            )
            self.scorers = scorer_starter.start()
            self._stores = start_stores(
                config.targets,
                library_settings(config, self._identity),
                max_fetched=most_fetched(config),
            )
            for store in self._stores:
                store.report_to.remote(self.log, "target_store")
        peers = TrainingPeers(
            buffer=self._buffer,
            data=ray.put(splits.to_draw_from()),
            log=self.log,
            control=self.control,
            scorers=self.scorers,
            stores=self._stores,
            identity=self._identity,
            generator_starter=generator_starter,
            scorer_starter=scorer_starter,
        )
        self.orchestrator = start_orchestrator(config, config.rollout, self.generators, peers)

    def keep_targets(self, view: ConsoleView) -> None:
        """Have the target library write what it has collected, and show what went wrong."""
        log = LogClient(self.log)
        for warning in flush_stores(self._stores):
            record = EventRecord(name="target library", detail=warning)
            log.add(record)
            view.update(record)

    def start_learners(self) -> LearnerGroup:
        """They load, validate and wait for the first draw, which waits for the orchestrator."""
        config = self.config
        limit_s = config.run.startup_timeout_s
        held_out, limit = self.splits.validation, config.validation.max_prompts
        job = LearnerJob(
            config=config,
            device=self.device,
            wires=Wires(
                buffer=self._buffer,
                orchestrator=self.orchestrator,
                log=self.log,
                control=self.control,
                driver_node=ray.get_runtime_context().get_node_id(),
                stores=self._stores,
                identity=self._identity,
            ),
            lease=self._lease,
            vocabulary_size=self.preflight.vocabulary_size,
            end_token_ids=self.preflight.student.ends(self.splits.train.end_token_id),
            validation=ray.put(tuple(held_out.demonstrations[:limit])),
            held_out_prompts=() if held_out.demonstrations else tuple(held_out.prompts[:limit]),
            probe_prompts=tuple(held_out.prompts[: config.validation.probe_prompts]),
        )
        group = LearnerGroup(
            placement.learners(config, self.device),
            job,
            worker.run,
            lambda: _checkpointed(config),
            lambda reason: LogClient(self.log).add(
                EventRecord(name="learners restart", detail=reason)
            ),
            None if self.shared is None else partial(self.shared.node_labels, limit_s),
        )
        group.start()
        return group
