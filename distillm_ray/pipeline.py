"""The job: wires the roles, runs them to the end and writes the report. Read this file first.

    preflight ──► connect ──► data ──┬─► generators, scorers ──► evaluate the student as it is ─┐
                                     └─► learners ──► validate the student as it is ────────────┤
                                                                                    open the buffer
    report ◄── evaluate student and teacher ◄── learners and rollout loop, to the last step ◄───┘

The driver moves no data: it starts actors, watches the log, and hands on a signal to stop. The
learners pull samples from the buffer, the rollout loop pulls work from it; nothing calls upwards.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, TypeAlias

import ray
from ray.exceptions import RayActorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distillm_ray.cluster import resources
from distillm_ray.cluster.actor_pool import Actor
from distillm_ray.cluster.cluster import Cluster, ask, release
from distillm_ray.cluster.connection import available, connect, resolve_device
from distillm_ray.cluster.learners import LearnerJob, Learners
from distillm_ray.cluster.loop_actor import LoopPeers
from distillm_ray.cluster.resources import Device
from distillm_ray.cluster.services import Wires
from distillm_ray.config import Config
from distillm_ray.config_files import dump_config
from distillm_ray.data.splits import Splits, load_splits
from distillm_ray.errors import ClusterError, UserError
from distillm_ray.evaluation.results import Evaluation, read_evaluation
from distillm_ray.evaluation.run_evaluator import RunEvaluator
from distillm_ray.files import write_atomically
from distillm_ray.learner.checkpoint import Checkpoint, CheckpointDirectory
from distillm_ray.log.commit import package_commit
from distillm_ray.log.records import DoneRecord, StepRecord, ValidationRecord
from distillm_ray.preflight import Preflight, check_run_directory
from distillm_ray.report.console import ConsoleView
from distillm_ray.run_directory import CHECKPOINT_FOLDER, CONFIG_FILE, held
from distillm_ray.types import Rollout, Source

_POLL_S = 0.5
_ASK_S = 120.0  # limit of small calls
_LOOP, _LOG = "the rollout loop", "the log"

Status: TypeAlias = Literal["complete", "stopped"]


def train(config: Config, preflight: Preflight, view: ConsoleView, *, command: str) -> Status:
    """Run or resume the job; returns how it ended.

    Raises:
        UserError: for the user's eyes.
        RunFailed: what restarts could not mend; the last checkpoint stays good.
    """
    return _Job(config, preflight, view, command).run()


@dataclass(slots=True, eq=False)
class _Roles:
    """Handles of what is running."""

    loop: Actor
    peers: LoopPeers

    @property
    def metrics(self) -> Actor:
        return self.peers.metrics

    @property
    def buffer(self) -> Actor:
        return self.peers.buffer

    @property
    def wires(self) -> Wires:
        return Wires(
            buffer=self.buffer,
            loop=self.loop,
            stores=tuple(self.peers.stores),
            metrics=self.metrics,
        )


class _Job:
    def __init__(
        self, config: Config, preflight: Preflight, view: ConsoleView, command: str
    ) -> None:
        self._config = config
        self._preflight = preflight
        self._view = view
        self._command = command
        self._seconds: dict[str, float] = {}
        self._stop = threading.Event()
        self._started = time.monotonic()

    def run(self) -> Status:
        config = self._config
        with self._phase("connecting to Ray"):
            connect(config)
            device = resolve_device(config)
            resources.check(resources.request(config, device), available())
        tokenizer = AutoTokenizer.from_pretrained(
            config.student.model, trust_remote_code=config.student.trust_remote_code
        )
        with self._phase("reading data"):
            splits = load_splits(config.data, tokenizer, config.run.seed)
            for line in _describe(splits):
                self._view.note(line)
        config.run.directory.mkdir(parents=True, exist_ok=True)
        with held(config.run.directory):
            # Looked at only now: until here another job may have been at work in it.
            resume_from = check_run_directory(config)
            return self._work(device, tokenizer, splits, resume_from)

    def _work(
        self,
        device: Device,
        tokenizer: PreTrainedTokenizerBase,
        splits: Splits,
        resume_from: Checkpoint | None,
    ) -> Status:
        config = self._config
        directory = config.run.directory
        write_atomically(directory / CONFIG_FILE, dump_config(config).encode())
        cluster = Cluster(config, device)
        roles = self._make_roles(cluster, splits, resume_from)
        with self._stopping_on_signals():
            learners = self._start_learners(cluster, roles, splits, device)
            with self._phase("starting generators, scorers and learners"):
                ask(
                    roles.loop.start.remote(),
                    "generators and scorers that start (twice run.startup_timeout_s)",
                    timeout_s=2 * config.run.startup_timeout_s,
                )
            evaluation = read_evaluation(directory) if resume_from else None
            evaluator = RunEvaluator(config, self._preflight, tokenizer, splits)
            if evaluation is None and evaluator.prompts:
                with self._phase("evaluating the student before training"):
                    evaluation = evaluator.before(roles.loop)
                    evaluation.write(directory)
            with self._phase("training"):
                completed = self._train(roles, learners)
            status: Status = "complete" if completed == config.learner.steps else "stopped"
            assert status == "complete" or self._stop.is_set(), f"learners left at step {completed}"
            if status == "complete" and evaluation is not None:
                self._evaluate(cluster, roles, evaluator, evaluation)
        self._finish(roles, status, completed)
        return status

    # ---- phases ----------------------------------------------------------------------------------

    def _make_roles(
        self, cluster: Cluster, splits: Splits, resume_from: Checkpoint | None
    ) -> _Roles:
        config, preflight = self._config, self._preflight
        metrics = cluster.metrics(
            resume_step=resume_from.meta.step if resume_from else None,
            commit=package_commit(),
            command=self._command,
        )
        buffer = cluster.buffer()
        data = (ray.put(splits.train.prompts), ray.put(splits.train.demonstrations))
        generators = scorers = stores = []
        if resources.wants_generators(config):
            generators = cluster.generators(
                preflight.student,
                Source.STUDENT,
                end_token_id=splits.train.end_token_id,
                trust_remote_code=config.student.trust_remote_code,
            )
        if config.loss.needs_teacher:
            scorers = cluster.scorers(preflight.vocabulary_size)
            stores = cluster.stores()
        peers = LoopPeers(
            generators=generators,
            scorers=scorers,
            stores=stores,
            buffer=buffer,
            data=data,
            metrics=metrics,
        )
        return _Roles(loop=cluster.loop(peers), peers=peers)

    def _start_learners(
        self, cluster: Cluster, roles: _Roles, splits: Splits, device: Device
    ) -> Learners:
        """They load, validate and then wait for the first draw, which waits for the loop to run."""
        job = LearnerJob(
            config=self._config,
            device=device,
            wires=roles.wires,
            vocabulary_size=self._preflight.vocabulary_size,
            validation=ray.put(self._limited(splits.validation.demonstrations)),
            probe_prompts=splits.validation.prompts[: self._config.validation.probe_prompts],
        )
        learners = Learners(lambda: cluster.train(job), self._config)
        learners.start()
        return learners

    def _train(self, roles: _Roles, learners: Learners) -> int:
        """Run learners and rollout loop side by side; returns the completed steps."""
        rollouts = roles.loop.run.remote()  # which opens the buffer
        position = 0
        told_to_stop = False
        while learners.is_alive():
            learners.join(_POLL_S)
            position = self._follow(roles, position)
            if self._stop.is_set():
                if not told_to_stop:
                    told_to_stop = True
                    self._view.note("stopping: the learners write a checkpoint first")
                # Every time, because a buffer that died forgets it.
                self._ask_buffer(roles.buffer.request_stop.remote())
            failure = self._ask_buffer(roles.buffer.failure.remote())
            if failure is not None:
                raise UserError(failure)
            if ray.wait([rollouts], timeout=0)[0] and learners.is_alive():
                ask(rollouts, _LOOP, timeout_s=_ASK_S)  # it only returns early by raising
        self._follow(roles, position)
        learners.raise_failure()
        self._ask_buffer(roles.buffer.finish.remote())
        ask(rollouts, _LOOP, timeout_s=_ASK_S)
        folder = self._config.run.directory / CHECKPOINT_FOLDER
        last = CheckpointDirectory(folder, keep=self._config.checkpoint.keep).latest()
        assert last is not None, "every end of the learners leaves a checkpoint"
        return last.meta.step

    def _evaluate(
        self,
        cluster: Cluster,
        roles: _Roles,
        evaluator: RunEvaluator,
        evaluation: Evaluation,
    ) -> None:
        with self._phase("evaluating the student after training"):
            after = evaluator.after(roles.loop, evaluation)
            release([*roles.peers.generators, *roles.peers.scorers])
            evaluation = after or evaluator.exported(cluster, evaluation)
            evaluation.write(self._config.run.directory)
        with self._phase("evaluating the teacher"):
            evaluator.teacher(cluster, evaluation).write(self._config.run.directory)

    def _finish(self, roles: _Roles, status: Status, completed: int) -> None:
        record = DoneRecord(
            step=completed,
            status=status,
            seconds=time.monotonic() - self._started,
            phase_seconds=self._seconds,
        )
        ask(roles.metrics.add.remote(record), _LOG, timeout_s=_ASK_S)
        self._view.update(record)
        ask(roles.metrics.close.remote(), _LOG, timeout_s=_ASK_S)

    # ---- helpers ---------------------------------------------------------------------------------

    def _follow(self, roles: _Roles, position: int) -> int:
        """Show what the log has that we have not seen; returns how far we have read."""
        try:
            call = roles.metrics.since.remote(position)
            records, position = ask(call, _LOG, timeout_s=_ASK_S)
        except RayActorError:
            return position  # the learners, which write to it, fail by its death
        for record in records:
            self._view.update(record)
        if not any(isinstance(record, StepRecord | ValidationRecord) for record in records):
            self._view.waiting(self._ask_buffer(roles.buffer.waiting.remote()))
        self._view.tick()
        return position

    def _ask_buffer(self, call: Any) -> Any:
        """The answer to a call, waited for while a buffer that died is being restarted.

        Raises:
            ClusterError: it does not come back.
        """
        limit = self._config.run.startup_timeout_s
        try:
            return ask(call, "the replay buffer (run.startup_timeout_s)", timeout_s=limit)
        except RayActorError as error:
            raise ClusterError(
                "the replay buffer died and does not come back; see the log of the driver's node"
                f" for the reason, then give the same command to resume ({error})"
            ) from error

    def _limited(self, demonstrations: tuple[Rollout, ...]) -> tuple[Rollout, ...]:
        return demonstrations[: self._config.validation.max_prompts]

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._view.start(name)
        started = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - started

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT asks for a checkpoint; a second SIGINT ends at once."""
        previous: dict[int, Any] = {}

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stop.is_set() and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop.set()

        if threading.current_thread() is threading.main_thread():
            previous = {
                number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)
            }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _describe(splits: Splits) -> list[str]:
    datasets = [splits.train, splits.validation, *([splits.test] if splits.test else [])]
    lines = [dataset.summary() for dataset in datasets]
    if splits.num_validation_twins:
        lines.append(
            f"warning: {splits.num_validation_twins} validation prompts are also training prompts,"
            " word for word: the validation loss will look better than it is"
        )
    return lines
