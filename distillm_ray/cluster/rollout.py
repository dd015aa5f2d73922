"""Generators as actors, and the pool that keeps them at the newest weights."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import ray
from ray.actor import ActorProxy
from ray.exceptions import ObjectLostError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distillm_ray.cluster.actors import cause_of, pooled
from distillm_ray.cluster.device_turns import DeviceTurns
from distillm_ray.cluster.elastic_pool import ElasticPool, Growth
from distillm_ray.cluster.log import AsyncLog
from distillm_ray.cluster.member import Member, PooledActor
from distillm_ray.cluster.placement import RoleSpec
from distillm_ray.cluster.shared_gpus import SharedGpus
from distillm_ray.config import ActorRange, GeneratorPoolConfig, SamplingConfig
from distillm_ray.errors import ClusterError
from distillm_ray.log.timeline import Timeline
from distillm_ray.rollout.engines import make_generator
from distillm_ray.rollout.generator import GeneratorJob, SlowRequest
from distillm_ray.types import Bucket, Demand, Prompt, Rollout, Weights

PublishedWeights: TypeAlias = "Weights[ray.ObjectRef[Bucket]]"

MAX_SLOW = 3
"""How often a response may exceed its limit before the run ends: other generators were as slow."""


class GeneratorActor(PooledActor):
    """A generator in a process of its own; it resolves the references of published weights."""

    def __init__(self, config: GeneratorPoolConfig, job: GeneratorJob) -> None:
        self._source = job.source
        self._generator = make_generator(config, job)

    @ray.method
    async def start(self) -> None:
        """Load the model."""
        await self._generator.start()

    @ray.method
    async def remark(self) -> str:
        """How the model runs, where that is slower than usual."""
        return self._generator.remark

    @ray.method
    async def silent_s(self) -> float:
        """Seconds since the engine got on with its requests; 0 if it has none."""
        return self._generator.silent_s

    @ray.method
    async def generate(self, demand: Demand) -> Rollout:
        """Respond to a demand, with weights of its minimum version or newer."""
        return await self._generator.generate(demand)

    @ray.method
    async def respond(self, prompt: Prompt, sampling: SamplingConfig, seed: int) -> Rollout:
        """Respond to a prompt outside of the demand."""
        return await self._generator.complete(prompt, sampling, seed=seed, source=self._source)

    @ray.method
    async def update_weights(self, weights: PublishedWeights, keep_in_flight: bool) -> float:
        """Take these weights; returns the seconds until they were in place."""
        limit_s = self._generator.config.stall_timeout_s
        try:
            buckets = await asyncio.wait_for(asyncio.gather(*weights.buckets), limit_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"the weights of version {weights.version} did not arrive within"
                f" rollout.stall_timeout_s = {limit_s:g} s"
            ) from error
        resolved = Weights(
            version=weights.version,
            buckets=tuple(buckets),
            nbytes=weights.nbytes,
            adapters=weights.adapters,
        )
        return await self._generator.update_weights(resolved, keep_in_flight=keep_in_flight)

    @ray.method
    async def sleep(self) -> None:
        """Leave the device to the learners, after the requests in flight."""
        await self._generator.sleep()

    @ray.method
    async def wake(self) -> None:
        """Take the device back."""
        await self._generator.wake()

    @ray.method
    async def stop(self) -> None:
        """Free the engine and its processes."""
        await self._generator.stop()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GeneratorStarter:
    """Starts the processes of a pool; they load nothing yet."""

    spec: RoleSpec
    config: GeneratorPoolConfig
    job: GeneratorJob
    shared: SharedGpus | None = None  # with the learners; None: each has devices of its own

    def start_one(
        self, place: PlacementGroupSchedulingStrategy | None = None
    ) -> ActorProxy[GeneratorActor]:
        """One more process."""
        actor = pooled(GeneratorActor, self.spec, self.job.device, place)
        return actor.remote(self.config, self.job)

    def start(self) -> list[ActorProxy[GeneratorActor]]:
        """Those that the pool has from its start on."""
        if self.shared is None:
            return [self.start_one() for _ in range(self.spec.count)]
        return [self.start_one(self.shared.place(index)) for index in range(self.spec.count)]


class GeneratorPool(ElasticPool[GeneratorActor]):
    """Generators of one model that all follow the newest published weights."""

    aborted = (SlowRequest,)

    def __init__(
        self,
        handles: Sequence[ActorProxy[GeneratorActor]],
        config: GeneratorPoolConfig,
        *,
        keep_in_flight: bool,
        startup_timeout_s: float,
        log: AsyncLog,
        timeline: Timeline | None = None,
        starter: GeneratorStarter | None = None,
        turns: DeviceTurns | None = None,
    ) -> None:
        """The pool grows by `starter`, if the config has a range of actors.

        `keep_in_flight`: requests continue while weights change; else they finish first.
        `turns`: in which members may load a model; None: always.
        """
        growth = None
        if isinstance(config.actors, ActorRange) and starter is not None:
            places = min(config.batch_size, config.max_in_flight)
            growth = Growth(bounds=config.actors, places=places, add=starter.start_one)
        super().__init__(
            handles,
            role="generator",
            max_in_flight=config.max_in_flight,
            stall_timeout_s=config.stall_timeout_s,
            min_actors=config.min_actors,
            startup_timeout_s=startup_timeout_s,
            log=log,
            timeline=timeline,
            growth=growth,
        )
        self._keep_in_flight = keep_in_flight
        self._turns = turns or DeviceTurns()
        self._newest: PublishedWeights | None = None

    async def start(self) -> None:
        """As `ActorPool.start`, in the generators' turn."""
        async with self._turns.working():
            await super().start()

    async def sleep(self) -> None:
        """Return when no member uses its device: it sleeps, or its process has ended.

        A member that fails at it is replaced, in the generators' next turn.
        """
        members = [member for member in self._members if member.ready.is_set()]
        await asyncio.gather(*(self._put_to_sleep(member) for member in members))

    async def wake(self) -> None:
        """Wake every member. One that fails at it is replaced."""
        members = [member for member in self._members if member.ready.is_set()]
        await asyncio.gather(*(self._wake(member) for member in members))

    async def generate(self, demand: Demand) -> Rollout:
        """Respond to a demand with weights of its minimum version or newer.

        Raises:
            ActorLost: the generator died or hung.
            SlowRequest: the response took longer than its limit.
            InputGivenUp: generators fail at this prompt.
        """
        return await self.call(
            f"prompt {demand.prompt_id} of the training data",
            lambda handle: handle.generate.remote(demand),
        )

    async def respond(self, prompt: Prompt, sampling: SamplingConfig, seed: int) -> Rollout:
        """Respond to a prompt outside of the demand, with the newest weights.

        Raises:
            ClusterError: the response took longer than its limit `MAX_SLOW` times, or generators
                fail at this prompt.
        """
        for _ in range(MAX_SLOW - 1):
            with contextlib.suppress(SlowRequest):
                return await self._respond(prompt, sampling, seed)
        try:
            return await self._respond(prompt, sampling, seed)
        except SlowRequest as error:
            raise too_slow(error) from error

    async def _respond(self, prompt: Prompt, sampling: SamplingConfig, seed: int) -> Rollout:
        return await self.call_until_done(
            f"prompt {prompt.prompt_id}",
            lambda handle: handle.respond.remote(prompt, sampling, seed),
        )

    async def update(self, weights: PublishedWeights) -> float:
        """Bring every ready member to these weights; returns the seconds of the slowest.

        A member that fails at it is replaced. Members that are starting take the weights when they
        have started.
        """
        self._newest = weights
        members = [member for member in self._members if member.ready.is_set()]
        return max(await asyncio.gather(*(self._update(member) for member in members)), default=0.0)

    async def rewind(self) -> None:
        """Bring every member back to the weights of the model directory."""
        self._newest = None
        await self.restart()

    async def _try_start(self, member: Member[GeneratorActor]) -> bool:
        async with self._turns.working():
            return await super()._try_start(member)

    async def _put_to_sleep(self, member: Member[GeneratorActor]) -> None:
        if not await self._tell(member, "falls asleep", lambda actor: actor.sleep.remote()):
            await self._await_end(member)

    async def _wake(self, member: Member[GeneratorActor]) -> None:
        await self._tell(member, "wakes", lambda actor: actor.wake.remote())

    async def _tell(
        self,
        member: Member[GeneratorActor],
        change: str,
        call: Callable[[ActorProxy[GeneratorActor]], ray.ObjectRef[None]],
    ) -> bool:
        """Whether a member has done it. One that has not is replaced."""
        life = member.life
        try:
            with self._timeline.slice("generator", f"{member.name}, device", change):
                await self._reply(member, call(member.handle))
        except (RayError, TimeoutError) as error:
            await self._replace(member, life, error)
            return False
        return True

    async def _update(self, member: Member[GeneratorActor]) -> float:
        life = member.life
        try:
            return await self._bring(member)
        except (RayError, TimeoutError) as error:
            await self._replace(member, life, error)
            return 0.0

    async def _prepare(self, member: Member[GeneratorActor]) -> None:
        taken = None
        while self._newest is not taken:  # newer ones may have been published meanwhile
            taken = self._newest
            await self._bring(member)

    async def _bring(self, member: Member[GeneratorActor]) -> float:
        assert self._newest is not None
        call = member.handle.update_weights.remote(self._newest, self._keep_in_flight)
        name = f"version {self._newest.version}"
        try:
            with self._timeline.slice("generator", f"{member.name}, weights", name):
                return await self._reply(member, call)
        except RayError as error:
            if not isinstance(cause_of(error), ObjectLostError):
                raise
            # The weights were lost with the learner that published them. Its successor publishes
            # again, and until then no demand asks for a newer version than the one here.
            return 0.0


def too_slow(error: SlowRequest) -> ClusterError:
    """What ends a run in which one response was aborted again and again."""
    return ClusterError(
        f"{error}, {MAX_SLOW} times; raise timeout_s, or lower sampling.max_tokens or"
        " engine.max_num_seqs, with which a response gets a larger share of the engine"
    )
