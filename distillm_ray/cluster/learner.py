"""The learners' Ray Train group: what its workers are told, and how the group ends."""

from __future__ import annotations

import math
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.actor import ActorProxy
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import (
    PreemptionError,
    TrainingFailedError,
    WorkerGroupError,
)

from distillm_ray.cluster.actors import BufferLost, thread_settings
from distillm_ray.cluster.buffer import BufferActor, ReplayConsumer
from distillm_ray.cluster.control import ControlActor, ControlClient
from distillm_ray.cluster.learner_turn import OwnDevice
from distillm_ray.cluster.log import LogActor, LogClient
from distillm_ray.cluster.orchestrator import (
    OrchestratorActor,
    OrchestratorClient,
    collective_limit_s,
)
from distillm_ray.cluster.placement import RoleSpec
from distillm_ray.cluster.preemption import is_preemption
from distillm_ray.cluster.reporter import Reporter
from distillm_ray.cluster.targets import TargetReader, TargetStoreActor
from distillm_ray.config import Config
from distillm_ray.errors import RunFailed, UserError
from distillm_ray.remote.run_store import store_of
from distillm_ray.run_directory import RAY_TRAIN_FOLDER
from distillm_ray.teacher.target_key import TargetIdentity
from distillm_ray.types import Device, Prompt, Rollout

FAILURE_FILE = "failure.txt"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wires:
    """Handles of every actor that a learner calls."""

    buffer: ActorProxy[BufferActor]
    orchestrator: ActorProxy[OrchestratorActor]
    log: ActorProxy[LogActor]
    control: ActorProxy[ControlActor]
    driver_node: str  # id of the node of driver, buffer and orchestrator
    stores: Sequence[ActorProxy[TargetStoreActor]] = ()
    identity: TargetIdentity | None = None  # of the targets; None without a teacher


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Links:
    """The clients of a rank: the rest of the system as the train loop sees it."""

    buffer: ReplayConsumer
    orchestrator: OrchestratorClient
    log: LogClient
    control: ControlClient
    targets: TargetReader | None = None  # None without a teacher
    turn: OwnDevice = field(default_factory=OwnDevice)
    nodes: tuple[str, ...] = ()  # ids of the rank's node and the driver's
    reporter: Reporter = field(default_factory=lambda: Reporter("learner"))

    @classmethod
    def over(cls, wires: Wires, config: Config) -> Links:
        """Clients for all wires."""
        orchestrator = OrchestratorClient(wires.orchestrator, config)
        targets = None
        if wires.identity is not None:
            targets = TargetReader(
                wires.stores,
                wires.identity,
                orchestrator.ensure_targets,
                max_bytes=config.targets.limit,
            )
        return cls(
            buffer=ReplayConsumer(wires.buffer),
            orchestrator=orchestrator,
            log=LogClient(wires.log),
            control=ControlClient(wires.control),
            targets=targets,
            nodes=(ray.get_runtime_context().get_node_id(), wires.driver_node),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearnerJob:
    """Everything that a worker is told."""

    config: Config
    device: Device
    wires: Wires
    vocabulary_size: int
    end_token_ids: tuple[int, ...]  # of the trained model
    validation: ray.ObjectRef[Sequence[Rollout]]  # held-out demonstrations
    held_out_prompts: tuple[Prompt, ...]  # where there are no held-out demonstrations
    probe_prompts: tuple[Prompt, ...]
    attempt: int = 0  # number of this group of workers
    lease: str = ""  # of a run directory in a store

    @property
    def most_probes(self) -> int:
        """Held-out prompts that the student responds to at a validation, at most."""
        return max(len(self.held_out_prompts), len(self.probe_prompts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    """Restarts of the group from the same checkpoint. A newer one sets the count back.

    So a long run may lose any number of machines, and an error that a restart does not fix ends it.

    Example:
        >>> restarts = Restarts(limit=1)
        >>> for step in (100, 200, 200):
        ...     restarts = restarts.after_failure(step)
        ...     print(restarts.count, restarts.exhausted)
        1 False
        1 False
        2 True
    """

    limit: int
    count: int = 0
    step: int = -1  # of the newest checkpoint at the last failure

    def after_failure(self, step: int) -> Restarts:
        """With one more failure, when the newest checkpoint is that of `step`."""
        return replace(self, count=self.count + 1 if step <= self.step else 1, step=step)

    @property
    def exhausted(self) -> bool:
        """Whether the group may not be restarted any more."""
        return self.count > self.limit


class LearnerGroup(threading.Thread):
    """Runs Ray Train's `fit`, which blocks, in a thread: the driver watches the run meanwhile.

    When ranks or Ray Train's controller fail, it runs `fit` again. Ray Train would count the
    failures of the run's whole life. Preemptions do not count at all: what Ray calls one, and the
    first failure after a notice.
    """

    def __init__(
        self,
        spec: RoleSpec,
        job: LearnerJob,
        worker: Callable[[LearnerJob], None],
        newest_checkpoint: Callable[[], int],
        say: Callable[[str], None],
        places: Callable[[], list[dict[str, str]]] | None = None,
    ) -> None:
        """Every rank runs `worker(job)`.

        `newest_checkpoint` returns its step, 0 without one. `say` gets the reason of each restart.
        `places` returns the labels of the node of each worker; None: those of the role.
        """
        super().__init__(daemon=True, name="learners")
        self._spec = spec
        self._job = job
        self._worker = worker
        self._newest_checkpoint = newest_checkpoint
        self._say = say
        self._places = places
        self._attempts = 0
        self._max_restarts = job.config.learner.max_restarts
        self._directory = job.config.run.local_directory
        self._store = store_of(job.config)
        self._failure: BaseException | None = None
        self._leaving: frozenset[str] = frozenset()  # nodes with a notice since the last failure

    def run(self) -> None:
        """Return when all ranks have ended; a failure is kept for `raise_failure`."""
        try:
            restarts = Restarts(limit=self._max_restarts)
            while True:
                try:
                    self._trainer().fit()
                    return
                except (TrainingFailedError, RayActorError) as error:
                    step = self._newest_checkpoint()
                    why = _what_failed(error)
                    if _raised_by_user_error(error):
                        raise
                    if self._leaving or is_preemption(error):
                        why += ", after the notice that a node will be taken away"
                        self._leaving = frozenset()
                    else:
                        restarts = restarts.after_failure(step)
                        if restarts.exhausted:
                            raise
                    self._say(f"{why}; back to step {step}")
        except BaseException as error:
            self._failure = error  # raised again in the driver's thread

    def expect_loss_of(self, node: str) -> None:
        """The cluster will take away this node, which learners or the driver are on."""
        self._leaving |= {node}

    def raise_failure(self) -> None:
        """Raise what the group ended with, if it failed. Call it after the thread's end only.

        Raises:
            UserError: raised by a rank.
            RunFailed: restarts did not fix it; the run's failure.txt has the details.
        """
        assert not self.is_alive()
        match self._failure:
            case None:
                return
            case WorkerGroupError() as failure:
                for cause in _causes(failure).values():
                    if isinstance(cause, UserError):
                        raise cause from failure
            case TrainingFailedError() | RayActorError() as failure:
                pass
            case other:
                raise other
        path = self._directory / FAILURE_FILE
        path.write_text("".join(traceback.format_exception(failure)), encoding="utf-8")
        raise RunFailed(
            f"{_what_failed(failure)}. The learners went back to the same checkpoint"
            f" learner.max_restarts = {self._max_restarts} times, which is the limit. {path} and"
            " the logs of the nodes have the details; the same command resumes from the last"
            " checkpoint"
        ) from failure

    def _trainer(self) -> TorchTrainer:
        self._attempts += 1
        spec, job = self._spec, replace(self._job, attempt=self._attempts)
        labels: dict[str, str] | list[dict[str, str]] | None = dict(spec.node_labels) or None
        if self._places is not None:
            labels = self._places()
        # Ray Train wants a resource for every worker.
        resources = {"CPU": spec.cpus, "GPU": spec.gpus}
        resources = {name: each for name, each in resources.items() if each} or {"CPU": 0.01}
        filesystem, storage = None, str((self._directory / RAY_TRAIN_FOLDER).resolve())
        if self._store is not None:
            filesystem, storage = self._store.filesystem_and_path(RAY_TRAIN_FOLDER)
        return TorchTrainer(
            _run_worker,
            train_loop_config={"worker": self._worker, "job": job},
            scaling_config=ScalingConfig(
                num_workers=spec.count,
                use_gpu=spec.gpus > 0,
                resources_per_worker=resources,
                label_selector=labels,
            ),
            torch_config=TorchConfig(
                backend="nccl" if job.device == "cuda" else "gloo",
                timeout_s=math.ceil(collective_limit_s(job.config, job.most_probes)),
            ),
            run_config=RunConfig(
                name="learners",
                storage_path=storage,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
                worker_runtime_env={
                    "env_vars": {
                        "DS_ACCELERATOR": job.device,
                        **thread_settings(spec.num_threads, job.device),
                    }
                },
            ),
        )


def _run_worker(arguments: dict[str, Any]) -> None:
    """Run one rank; Ray Train passes its arguments as a dictionary.

    A user's error also goes to run control: other ranks may wait for this one in a collective.
    """
    job: LearnerJob = arguments["job"]
    try:
        arguments["worker"](job)
    except UserError as error:
        ControlClient(job.wires.control).fail(str(error))
        raise


def _causes(error: WorkerGroupError) -> dict[int, BaseException]:
    """What each rank that failed ended with."""
    return {rank: one.__cause__ or one for rank, one in error.worker_failures.items()}


def _raised_by_user_error(error: Exception) -> bool:
    """Whether a rank ended with an error that a restart does not fix."""
    if not isinstance(error, WorkerGroupError):
        return False
    return any(isinstance(cause, UserError) for cause in _causes(error).values())


def _what_failed(error: Exception) -> str:
    """Who failed and how, on one line."""
    if isinstance(error, PreemptionError):
        return "the learners lost a node"
    if not isinstance(error, WorkerGroupError):
        return f"the controller of the learners failed: {_first_line(error)}"
    rank, cause = next(iter(_causes(error).items()))
    if isinstance(cause, BufferLost):
        return "the replay buffer died, possibly out of memory"
    return f"rank {rank} of the learners failed: {_first_line(cause)}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"
