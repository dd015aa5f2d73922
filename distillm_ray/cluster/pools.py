"""The two pools of a run: generators that follow the weights, scorers in front of the stores."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import Any

from ray.exceptions import ObjectLostError, RayError

from distillm_ray.cluster.actor_pool import Actor, ActorPool, Member, cause_of, one_line
from distillm_ray.config import SamplingConfig
from distillm_ray.errors import ClusterError
from distillm_ray.rollout.loop import ActorLost
from distillm_ray.types import Demand, Prompt, Rollout, ScoreReport, Weights

STORE_TIMEOUT_S = 60.0
GENERATOR_CALL_TIMEOUTS = 2
"""Of `rollout.timeout_s`, for a call to a generator: an answer may first wait for its weights."""


class Generators(ActorPool):
    """A pool of `GeneratorActor`s that all follow the newest published weights."""

    def __init__(self, handles: Sequence[Actor], *, keep_in_flight: bool, **settings: Any) -> None:
        super().__init__(handles, role="generator", **settings)
        self._keep_in_flight = keep_in_flight
        self._newest: Weights | None = None

    async def generate(self, demand: Demand) -> Rollout:
        """See `loop.GeneratorPool`."""
        return await self.call(lambda handle: handle.generate.remote(demand))

    async def answer(self, prompt: Prompt, sampling: SamplingConfig, seed: int) -> Rollout:
        """See `loop.GeneratorPool`."""
        while True:  # the pool itself limits how often a member may fail
            try:
                return await self.call(lambda handle: handle.answer.remote(prompt, sampling, seed))
            except ActorLost:
                continue

    async def update(self, weights: Weights) -> float:
        """Bring every ready member to these weights; a member that fails at it is replaced.

        Members that are just starting take them when they have started.
        """
        self._newest = weights
        members = [member for member in self._members if member.ready.is_set()]
        return max(await asyncio.gather(*(self._update(member) for member in members)), default=0.0)

    async def rewind(self) -> None:
        """The learners went back in time: forget all weights published since the start."""
        self._newest = None
        await self.restart()

    async def _update(self, member: Member) -> float:
        life = member.life
        try:
            return await self._bring(member)
        except (RayError, TimeoutError) as error:
            await self._replace(member, life, error)
            return 0.0

    async def _prepare(self, member: Member) -> None:
        taken = None
        while self._newest is not taken:  # newer ones may come meanwhile
            taken = self._newest
            await self._bring(member)

    async def _bring(self, member: Member) -> float:
        assert self._newest is not None
        call = member.handle.update_weights.remote(self._newest, self._keep_in_flight)
        try:
            return await asyncio.wait_for(call, self._call_timeout_s)
        except RayError as error:
            if not isinstance(cause_of(error), ObjectLostError):
                raise
            # They went with the learner that had published them. The one that takes its place
            # publishes anew, and until then no demand asks for more than is here.
            return 0.0


class Targets(ActorPool):
    """Scorers in front of the target stores. A payload goes from scorer to store by reference."""

    def __init__(
        self,
        handles: Sequence[Actor],
        stores: Sequence[Actor],
        **settings: Any,
    ) -> None:
        super().__init__(handles, role="scorer", **settings)
        self._stores = stores
        self._under_way: dict[str, asyncio.Future[None]] = {}

    async def ensure(self, rollout: Rollout) -> int:
        """See `loop.TargetService`. The same sequence is never scored twice at once."""
        rollout_id = rollout.rollout_id
        while rollout_id in self._under_way:
            await asyncio.wait((self._under_way[rollout_id],))
        done = self._under_way[rollout_id] = asyncio.get_running_loop().create_future()
        try:
            return await self._ensure(rollout)
        finally:
            del self._under_way[rollout_id]
            done.set_result(None)

    async def _ensure(self, rollout: Rollout) -> int:
        index = store_index(rollout.rollout_id, len(self._stores))
        has = self._stores[index].has.remote(rollout.rollout_id)
        try:
            if await asyncio.wait_for(has, STORE_TIMEOUT_S):
                return 0
        except (RayError, TimeoutError) as error:
            raise ClusterError(
                f"target store {index} did not answer within {STORE_TIMEOUT_S:g} s:"
                f" {one_line(error)}"
            ) from error
        return await self.replace(rollout)

    async def replace(self, rollout: Rollout) -> int:
        """See `loop.TargetService`. The pool itself limits how often a scorer may fail."""
        store = self._stores[store_index(rollout.rollout_id, len(self._stores))]
        while True:
            try:
                report = await self.call(lambda handle: _score(handle, rollout, store))
            except ActorLost:
                continue
            return report.num_tokens


def store_index(rollout_id: str, num_stores: int) -> int:
    """Which store owns a sequence's targets: the same on every process and in every run."""
    return zlib.crc32(rollout_id.encode()) % num_stores


async def _score(handle: Actor, rollout: Rollout, store: Actor) -> ScoreReport:
    """Score and store. Only the metadata is awaited here; the payload never comes by."""
    report_ref, payload_ref = handle.score.options(num_returns=2).remote(rollout)
    report: ScoreReport = await report_ref
    await store.put.remote(rollout.rollout_id, payload_ref, report.nbytes)
    return report
