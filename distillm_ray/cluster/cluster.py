"""Where the roles run: the only file with `ray.remote`, placement and restarts.

    driver ──► Cluster ──► GeneratorActor x rollout.actors     ─┐
                     ├──► ScorerActor x teacher.actors          ├─ RolloutLoopActor drives them
                     ├──► TargetStoreActor x targets.stores    ─┘
                     ├──► BufferActor, MetricsActor                (no CPU asked, beside the driver)
                     └──► Ray Train: learner_worker x learner.workers

No actor is detached: when the driver goes, by whatever signal, everything goes with it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distillm_ray.cluster.actor_pool import Actor
from distillm_ray.cluster.actors import (
    GeneratorActor,
    MetricsActor,
    PooledActor,
    ScorerActor,
    TargetStoreActor,
)
from distillm_ray.cluster.buffer_actor import BufferActor
from distillm_ray.cluster.learners import LearnerJob
from distillm_ray.cluster.loop_actor import LoopPeers, RolloutLoopActor
from distillm_ray.cluster.resources import Device
from distillm_ray.config import Config, Dtype, RolloutConfig, TeacherConfig, cpu_threads
from distillm_ray.errors import ClusterError, UserError
from distillm_ray.models.directory import ModelFacts
from distillm_ray.types import Rollout, Source

_remote: Any = ray.remote  # its annotations know only some of its options
_LOOP_CONCURRENCY = 1000  # calls that an asynchronous actor of ours may have open
_STORE_RETRIES = 5  # what a store does can be done twice


class Cluster:
    """Starts the roles of one run and holds their handles."""

    def __init__(self, config: Config, device: Device) -> None:
        self._config = config
        self._device: Device = device

    def metrics(self, **settings: Any) -> Actor:
        """The run's log, on the driver's node: that is where the run directory is for sure."""
        return self._beside_driver(MetricsActor, self._config.run.directory, **settings)

    def buffer(self) -> Actor:
        """The replay buffer. It starts empty, and again so after a restart.

        A call that its death interrupts reaches the restarted one, which knows what to answer.
        """
        return self._beside_driver(BufferActor, self._config, max_restarts=-1, max_task_retries=-1)

    def loop(self, peers: LoopPeers) -> Actor:
        """The rollout loop over all of these."""
        return self._beside_driver(RolloutLoopActor, self._config, peers)

    def generators(
        self, model: ModelFacts, source: Source, *, end_token_id: int, trust_remote_code: bool
    ) -> list[Actor]:
        """A pool that answers with `model`; `end_token_id` ends the answers of the data."""
        config = self._rollouts()
        actor = self._pooled(GeneratorActor, config)
        return [
            actor.remote(
                source,
                config,
                model_dir=model.path,
                end_token_ids=tuple(dict.fromkeys((*model.end_token_ids, end_token_id))),
                max_prompt_tokens=self._config.data.max_prompt_tokens,
                max_response_tokens=self._config.longest_response,
                seed=self._config.run.seed,
                device=self._device,
                vocabulary_size=model.vocabulary_size,
                trust_remote_code=trust_remote_code,
            )
            for _ in range(config.actors)
        ]

    def scorers(self, vocabulary_size: int) -> list[Actor]:
        """The teacher's pool."""
        config = self._config.teacher
        actor = self._pooled(ScorerActor, config)
        return [
            actor.remote(
                config,
                self._config.targets,
                device=self._device,
                vocabulary_size=vocabulary_size,
            )
            for _ in range(config.actors)
        ]

    def stores(self) -> list[Actor]:
        """The target stores, spread over the nodes."""
        config = self._config.targets
        actor = _remote(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=_STORE_RETRIES,
            scheduling_strategy="SPREAD",
        )(TargetStoreActor)
        return [actor.remote(config.max_bytes // config.stores) for _ in range(config.stores)]

    def train(self, job: LearnerJob) -> None:
        """Run the learners to their end; returns when all ranks have. See `Learners` for failures.

        Ray Train restarts ranks that fail; here its controller is replaced when that dies.
        """
        config = self._config.learner
        cpus = {"CPU": config.num_cpus} if config.num_cpus > 0 else {}
        gpus = self._gpus(config.num_gpus, 1)
        trainer = TorchTrainer(
            _learner_worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=gpus > 0,
                resources_per_worker={**cpus, **({"GPU": gpus} if gpus else {})} or {"CPU": 0.01},
            ),
            torch_config=TorchConfig(backend="nccl" if self._device == "cuda" else "gloo"),
            run_config=RunConfig(
                name="learners",
                storage_path=str((self._config.run.directory / "ray_train").resolve()),
                failure_config=FailureConfig(max_failures=config.max_restarts),
                worker_runtime_env={
                    "env_vars": {
                        "DS_ACCELERATOR": self._device,
                        **_thread_settings(cpu_threads(config), self._device),
                    }
                },
            ),
        )
        for restarts in itertools.count(1):
            try:
                trainer.fit()
                return
            except RayActorError:
                if restarts > config.max_restarts:
                    raise

    def held_out_loss(
        self,
        model: ModelFacts,
        demonstrations: Sequence[Rollout],
        *,
        dtype: Dtype,
        vocabulary_size: int,
        trust_remote_code: bool,
    ) -> ray.ObjectRef[float]:
        """Cross-entropy of a model directory, token mean in nats, in a learner's place."""
        section = self._config.learner
        task = _remote(
            num_cpus=section.num_cpus, num_gpus=self._gpus(section.num_gpus, 1), max_retries=0
        )(_held_out_loss)
        return task.remote(
            model.path,
            demonstrations,
            dtype=dtype,
            vocabulary_size=vocabulary_size,
            max_batch_tokens=section.max_micro_batch_tokens,
            device=self._device,
            trust_remote_code=trust_remote_code,
            num_threads=cpu_threads(section),
        )

    def _rollouts(self) -> RolloutConfig:
        """The section with the length of a rollout written out."""
        section = self._config.rollout
        limit = {"max_tokens": self._config.max_response_tokens}
        sampling = section.sampling.model_copy(update=limit)
        return section.model_copy(update={"sampling": sampling})

    def _gpus(self, explicit: float | None, default: float) -> float:
        if self._device == "cpu":
            return 0
        return default if explicit is None else explicit

    def _pooled(self, role: type[PooledActor], section: RolloutConfig | TeacherConfig) -> Any:
        """A role's class for Ray, which restarts its actors; the pool sees to the calls."""
        return _remote(
            num_cpus=section.num_cpus,
            num_gpus=self._gpus(section.num_gpus, section.tensor_parallel),
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=_LOOP_CONCURRENCY,
            runtime_env={"env_vars": _thread_settings(cpu_threads(section), self._device)},
        )(role)

    def _beside_driver(
        self,
        role: type,
        *arguments: Any,
        max_restarts: int = 0,
        max_task_retries: int = 0,
        **settings: Any,
    ) -> Actor:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = _remote(
            num_cpus=0,
            max_restarts=max_restarts,
            max_task_retries=max_task_retries,
            max_concurrency=_LOOP_CONCURRENCY if role is not MetricsActor else 1,
            scheduling_strategy=here,
        )(role)
        return actor.remote(*arguments, **settings)


def ask(call: Any, what: str, *, timeout_s: float) -> Any:
    """`ray.get` with a limit that hands on a user's error as itself.

    Raises:
        ClusterError: no answer in time; it names `what`.
    """
    try:
        return ray.get(call, timeout=timeout_s)
    except GetTimeoutError as error:
        raise ClusterError(
            f"no answer within {timeout_s:g} s: {what}; the process hangs, or the cluster is"
            " overloaded; see the log of the driver's node"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise


def release(actors: Sequence[Actor]) -> None:
    """End actors for good and give their CPUs and GPUs back."""
    for actor in actors:
        ray.kill(actor)


def _held_out_loss(model: Path, demonstrations: Sequence[Rollout], **settings: Any) -> float:
    from distillm_ray.learner.held_out_loss import held_out_loss  # noqa: PLC0415  not in the driver

    return held_out_loss(model, demonstrations, **settings)


def _learner_worker(settings: dict[str, Any]) -> None:
    from distillm_ray.learner.worker import run  # noqa: PLC0415  the driver loads no DeepSpeed

    job: LearnerJob = settings["job"]
    try:
        run(job)
    except UserError as error:
        ray.get(job.wires.buffer.fail.remote(str(error)), timeout=60)
        raise


def _thread_settings(num_threads: int, device: Device) -> dict[str, str]:
    """Roles share cores and memory on a CPU-only machine.

    A thread that waits must not spin on a core. glibc is not to keep a heap for every thread. On
    the CPU it asks for huge pages (from 2.35 on), because torch's tensors are mapped anew at every
    use, and the faults of small pages are a good part of a step.
    """
    settings = {
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }
    if device == "cpu":
        tunables = (os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1")
        settings["GLIBC_TUNABLES"] = ":".join(filter(None, tunables))
    return settings
