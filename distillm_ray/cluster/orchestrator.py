"""The orchestrator as an actor, and as the learners call it; orchestrator_loop.py has its loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import ray
from ray.actor import ActorProxy

from distillm_ray.cluster.actors import CALL_TIMEOUT_S, ask, beside_driver, reply
from distillm_ray.cluster.buffer import BufferActor, ReplayProducer
from distillm_ray.cluster.control import ControlActor
from distillm_ray.cluster.device_turns import DeviceTurns
from distillm_ray.cluster.log import AsyncLog, LogActor
from distillm_ray.cluster.orchestrator_loop import Orchestrator
from distillm_ray.cluster.process_meter import source_of
from distillm_ray.cluster.reporter import Reporter
from distillm_ray.cluster.response_stream import ResponseStream
from distillm_ray.cluster.rollout import (
    GeneratorActor,
    GeneratorPool,
    GeneratorStarter,
    PublishedWeights,
)
from distillm_ray.cluster.targets import (
    MAX_SCORING_ROUNDS,
    ScorerActor,
    ScorerPool,
    ScorerStarter,
    TargetStoreActor,
)
from distillm_ray.config import Config, GeneratorPoolConfig, SamplingConfig
from distillm_ray.log.costs import Usage
from distillm_ray.log.records import Counters
from distillm_ray.teacher.target_key import TargetIdentity
from distillm_ray.types import (
    Bucket,
    DrawFacts,
    Prompt,
    Rollout,
    Source,
    TrainingData,
    TrainStep,
)

_SMALL_CALLS = 10  # to buffer, log and run control between two collectives of the learners


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingPeers:
    """The actors of a training run that the orchestrator works with."""

    buffer: ActorProxy[BufferActor]
    data: ray.ObjectRef[TrainingData]
    log: ActorProxy[LogActor]
    control: ActorProxy[ControlActor]
    scorers: Sequence[ActorProxy[ScorerActor]] = ()
    stores: Sequence[ActorProxy[TargetStoreActor]] = ()
    identity: TargetIdentity | None = None  # of the targets; set where there are scorers
    # For pools whose config has a range of actors:
    generator_starter: GeneratorStarter | None = None
    scorer_starter: ScorerStarter | None = None


class OrchestratorActor:
    """Hosts an `Orchestrator`. Without `peers` it only responds to prompts (evaluation)."""

    def __init__(
        self,
        config: Config,
        pool: GeneratorPoolConfig,
        generators: Sequence[ActorProxy[GeneratorActor]],
        peers: TrainingPeers | None,
    ) -> None:
        log = self._log = AsyncLog(peers.log if peers is not None else None)
        self._reporter = Reporter("orchestrator", self._usages, lambda: self._loop.pools())
        timeline = self._reporter.timeline
        startup_timeout_s = config.run.startup_timeout_s
        shares = config.is_colocated and peers is not None
        turns = DeviceTurns(config.learner.workers if shares else 0)
        buffer = scorers = generator_pool = None
        if peers is not None:
            buffer = ReplayProducer(
                peers.buffer, peers.data, log, restore_limit_s=startup_timeout_s
            )
        if generators:
            generator_pool = GeneratorPool(
                generators,
                pool,
                keep_in_flight=config.rollout.max_staleness > 0,
                startup_timeout_s=startup_timeout_s,
                log=log,
                timeline=timeline,
                starter=None if peers is None else peers.generator_starter,
                turns=turns,
            )
        if peers is not None and peers.scorers:
            assert config.teacher is not None
            assert peers.identity is not None
            scorers = ScorerPool(
                peers.scorers,
                peers.stores,
                peers.identity,
                stall_timeout_s=config.teacher.timeout_s,
                startup_timeout_s=startup_timeout_s,
                log=log,
                min_actors=config.teacher.min_actors,
                timeline=timeline,
                starter=peers.scorer_starter,
            )
        self._loop = Orchestrator(
            buffer=buffer,
            generators=generator_pool,
            scorers=scorers,
            log=log,
            response_filter=config.rollout.filter,
            scores_rollouts=config.loss.compares(Source.STUDENT),
            waited=None if peers is None else partial(_waited, peers.control),
            timeline=timeline,
            turns=turns,
        )
        self._stream = ResponseStream()
        self._reported = Counters()
        if peers is not None:
            self._reporter.start(peers.log)

    @ray.method
    async def start(self) -> None:
        """Start generators and scorers; returns when all are ready."""
        await self._loop.start()

    @ray.method
    async def run(self) -> None:
        """Work until `finish` is called."""
        await self._loop.run()

    @ray.method
    async def finish(self) -> None:
        """Make `run` return: the learners have ended."""
        await self._loop.finish()
        if (report := self._reporter.send()) is not None:
            await reply(report, "the log")

    @ray.method
    async def release_added(self) -> None:
        """End the generators and scorers that elastic pools have added: their work is done."""
        self._loop.release_added()

    @ray.method
    async def restore(self, state: bytes | None, completed: int) -> None:
        """Reset buffer, generators and log to the learners' checkpoint."""
        await self._loop.restore(state, completed)

    @ray.method
    async def publish(self, weights: PublishedWeights) -> None:
        """Start to bring the generators to these weights."""
        await self._loop.publish(weights)

    @ray.method
    async def take_device(self, attempt: int, rank: int, hurried: bool, timeout_s: float) -> bool:
        """A rank asks for the device that it shares with a generator.

        Returns whether it has it after `timeout_s` at most. `attempt` numbers the groups of
        learners. `hurried`: the run ends, so work that has not begun is not waited for.
        """
        return await self._loop.take_device(attempt, rank, hurried=hurried, timeout_s=timeout_s)

    @ray.method
    async def lend_device(self, attempt: int, rank: int) -> None:
        """A rank has freed the device that it shares, and waits for the generators."""
        self._loop.lend_device(attempt, rank)

    @ray.method
    async def ensure_targets(self, rollouts: Sequence[Rollout]) -> None:
        """Have the targets of these sequences stored."""
        await self._loop.ensure_targets(rollouts)

    @ray.method
    async def respond(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
    ) -> list[Rollout]:
        """Respond to prompts, in order."""
        return await self._loop.respond(prompts, sampling, seed)

    @ray.method
    async def exchange(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
    ) -> list[Rollout]:
        """Start to respond to prompts; returns the responses that ended since the last call.

        Waits for one if there is none.
        """

        async def respond(prompt: Prompt) -> Rollout:
            (response,) = await self._loop.respond((prompt,), sampling, seed)
            return response

        return await self._stream.exchange(prompts, respond)

    @ray.method
    async def report_step(self, train: TrainStep, facts: DrawFacts) -> None:
        """Log a step with what the other roles did since the last one."""
        record, self._reported = await self._loop.step_record(train, facts, since=self._reported)
        await self._log.add(record)

    def _usages(self) -> list[Usage]:
        """Readings of the pools. They are numbered by this process: another one begins at 0."""
        return [
            Usage(role=role, source=f"{source_of(os.getpid())} {role}s", cost=cost)
            for role, cost in self._loop.costs().items()
        ]


async def _waited(control: ActorProxy[ControlActor]) -> float:
    """For how many seconds the learners have waited for samples, so far."""
    return (await reply(control.status.remote(), "run control")).waited_s


def start_orchestrator(
    config: Config,
    pool: GeneratorPoolConfig,
    generators: Sequence[ActorProxy[GeneratorActor]],
    peers: TrainingPeers | None = None,
) -> ActorProxy[OrchestratorActor]:
    """Start the actor on the driver's node; `start` then starts its pools."""
    return beside_driver(OrchestratorActor).remote(config, pool, generators, peers)


# ---- the learners' side --------------------------------------------------------------------------


class OrchestratorClient:
    """The actor as a learner calls it."""

    def __init__(self, actor: ActorProxy[OrchestratorActor], config: Config) -> None:
        self._actor = actor
        self._config = config
        self._probed = 0
        self._probe: ray.ObjectRef[list[Rollout]] | None = None
        self._last_report: ray.ObjectRef[None] | None = None

    def restore(self, state: bytes | None, completed: int) -> None:
        """Reset buffer, generators and log to the state as of draw `completed`."""
        ask(
            self._actor.restore.remote(state, completed),
            "resetting buffer and generators to the checkpoint (twice run.startup_timeout_s)",
            timeout_s=restore_limit_s(self._config),
        )

    def ensure_targets(self, rollouts: Sequence[Rollout]) -> None:
        """Have the targets of these sequences stored, scoring those that are missing."""
        ask(
            self._actor.ensure_targets.remote(rollouts),
            f"scoring {len(rollouts)} sequences (learner.data_timeout_s)",
            timeout_s=self._config.learner.data_timeout_s,
        )

    def put(self, bucket: Bucket) -> ray.ObjectRef[Bucket]:
        """Hand over one bucket of weights; the reference goes into `Weights.buckets`."""
        return ray.put(bucket)

    def publish(self, weights: PublishedWeights) -> None:
        """Make `weights` the newest version; returns before the generators have taken it."""
        ask(
            self._actor.publish.remote(weights),
            "the generators taking the weights published before (rollout.timeout_s)",
            timeout_s=publish_limit_s(self._config),
        )

    def start_probe(self, prompts: Sequence[Prompt]) -> None:
        """Have the generators respond to held-out prompts with the weights just published."""
        config = self._config
        scored = config.validation.metric == "rouge_l"
        sampling = config.evaluation.sampling if scored else config.rollout.sampling
        self._probed = len(prompts)
        self._probe = self._actor.respond.remote(prompts, sampling, config.run.seed)

    def finish_probe(self) -> list[Rollout]:
        """Wait for the responses of `start_probe`."""
        assert self._probe is not None
        return ask(
            self._probe,
            f"the responses to {self._probed} held-out prompts (rollout.timeout_s)",
            timeout_s=probe_limit_s(self._config, self._probed),
        )

    def report_step(self, train: TrainStep, facts: DrawFacts) -> None:
        """Log a step; the orchestrator adds what the other roles did.

        The call's result is read at the next step, so that the log delays no step. A failed call
        raises there, or in `finish_report`.
        """
        self.finish_report()
        self._last_report = self._actor.report_step.remote(train, facts)

    def finish_report(self) -> None:
        """Wait until the step reported last is in the log.

        A checkpoint must not be committed before: a restart from it would never log that step.
        """
        if self._last_report is not None:
            ask(self._last_report, "the log of the last step")
            self._last_report = None


# ---- limits --------------------------------------------------------------------------------------


def restore_limit_s(config: Config) -> float:
    """Until log, generators and buffer are back at a checkpoint, one after the other.

    Generators may have to start again.
    """
    return 2 * config.run.startup_timeout_s + 4 * CALL_TIMEOUT_S


def publish_limit_s(config: Config) -> float:
    """Until the weights published before are in place.

    Every generator may have to wake, finish all its requests first, load, and be replaced.
    """
    pool = config.rollout
    in_flight = pool.max_in_flight * pool.fewest
    drained_s = pool.limit_s(in_flight, config.longest_response)
    wakes_s = pool.stall_timeout_s if config.is_colocated else 0.0
    loaded_s = pool.stall_timeout_s + config.run.startup_timeout_s
    return wakes_s + drained_s + loaded_s + CALL_TIMEOUT_S


def probe_limit_s(config: Config, num_prompts: int) -> float:
    """Until the responses to held-out prompts are there.

    They wait for the published weights, and stand in line behind the demand.
    """
    ahead = config.rollout.open_steps * config.learner.batch_size
    responses_s = config.rollout.limit_s(num_prompts + ahead, config.longest_response)
    return publish_limit_s(config) + responses_s


def turn_limit_s(config: Config, num_prompts: int) -> float:
    """Until the generators have given up the devices that they share with the learners.

    They finish all that they had to do, and fall asleep.
    """
    return probe_limit_s(config, num_prompts) + config.rollout.stall_timeout_s


def collective_limit_s(config: Config, num_prompts: int) -> float:
    """How long a rank may wait for another one in a collective.

    Longer than all that rank 0 may wait for between two collectives, so that its own limit ends
    first and says what did not come.

    Args:
        num_prompts: held-out prompts that the student responds to at a validation.
    """
    scoring_s = MAX_SCORING_ROUNDS * (config.learner.data_timeout_s + CALL_TIMEOUT_S)
    return (
        restore_limit_s(config)
        + publish_limit_s(config)
        + probe_limit_s(config, num_prompts)
        + scoring_s
        + (turn_limit_s(config, num_prompts) if config.is_colocated else 0.0)
        + _SMALL_CALLS * CALL_TIMEOUT_S
    )
