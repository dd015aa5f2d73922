"""Teacher targets on the cluster: scorers compute them, stores own them, learners read them.

    orchestrator ─ ensure(rollout) ─► ScorerPool ─► ScorerActor ── payload by reference ──┐
                                                                                           ▼
                        learner ◄── TargetReader ◄──────── get(keys) ──────────── TargetStoreActor

A target is found by its key, a digest of teacher and sequence (`teacher/target_key.py`), so that
whoever has the same sequence shares it. The store owns the payload: it survives the deaths of the
scorer, the orchestrator and their nodes. A target that is lost is scored again under the same key;
so is the target of a store that fails, which is replaced (`cluster/store_calls.py`).

Behind the stores there may be a library on disk (`teacher/target_library.py`): what a store does
not hold, it takes from there before it reports a miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import ray
from ray.actor import ActorProxy
from ray.exceptions import RayError

from distillm_ray.cluster.actors import CALL_TIMEOUT_S, ask, pooled, spread
from distillm_ray.cluster.busy_clock import BusyClock
from distillm_ray.cluster.elastic_pool import ElasticPool, Growth
from distillm_ray.cluster.log import AsyncLog
from distillm_ray.cluster.member import PooledActor
from distillm_ray.cluster.placement import RoleSpec
from distillm_ray.cluster.reporter import Reporting
from distillm_ray.cluster.store_calls import STORE_SILENCE_S, StoreCalls, StoreLost
from distillm_ray.config import ActorRange, TargetsConfig, TeacherConfig
from distillm_ray.errors import ClusterError
from distillm_ray.log.timeline import Timeline
from distillm_ray.teacher.target_key import TargetIdentity, target_key
from distillm_ray.teacher.target_library import LibrarySettings, TargetLibrary, is_shared
from distillm_ray.teacher.target_store import StoreCounters, TargetStore
from distillm_ray.types import Device, Rollout, ScoreReport, TeacherTargets

TargetRef: TypeAlias = "ray.ObjectRef[TeacherTargets]"
Reply = TypeVar("Reply")

MAX_SCORING_ROUNDS = 3
_STORE_RETRIES = 5  # a store's calls may be repeated: each of them is idempotent
REQUESTS_PER_SCORER = 64  # queued at a scorer, so that its batches can fill


# ---- actors --------------------------------------------------------------------------------------


class ScorerActor(PooledActor):
    """A scorer in a process of its own."""

    def __init__(
        self, teacher: TeacherConfig, targets: TargetsConfig, vocabulary_size: int, device: Device
    ) -> None:
        from distillm_ray.teacher.scorer import Scorer  # noqa: PLC0415  the driver loads no model

        self._scorer = Scorer(teacher, targets, vocabulary_size=vocabulary_size, device=device)

    @ray.method
    async def start(self) -> None:
        """Load the teacher."""
        await self._scorer.start()

    @ray.method
    async def remark(self) -> str:
        """How the teacher runs packed rows, where that is slower than usual."""
        return self._scorer.remark

    @ray.method
    async def silent_s(self) -> float:
        """Seconds since the running forward pass began; 0 if none runs."""
        return self._scorer.silent_s

    @ray.method(num_returns=2)
    async def score(self, rollout: Rollout) -> tuple[ScoreReport, TeacherTargets]:
        """Score one sequence. Ray returns report and targets as two objects."""
        return await self._scorer.score(rollout)


class TargetStoreActor(Reporting):
    """A `TargetStore` of references that this process made by `ray.put`, and so owns.

    Args:
        library: behind the store; None: there is none.
        index, count: which of how many stores this is, and so which keys it is asked for.
        max_fetched: as in `TargetStore`.
    """

    def __init__(
        self,
        max_bytes: int,
        library: LibrarySettings | None = None,
        index: int = 0,
        count: int = 1,
        max_fetched: int | None = None,
    ) -> None:
        self._store: TargetStore[TargetRef] = TargetStore(max_bytes, max_fetched=max_fetched)
        self._library: TargetLibrary | None = None
        if library is not None:
            self._library = TargetLibrary(
                library, owns=lambda key: store_index(key, count) == index
            )

    @ray.method
    def put(self, key: str, payload: TeacherTargets, report: ScoreReport, shared: bool) -> bool:
        """Keep a payload, in the library too if it is shared; False if the store is too small."""
        if self._library is not None and shared:
            self._library.put(key, payload, report)
        return self._store.put(key, ray.put(payload), report.nbytes, recurs=shared)

    @ray.method
    def get(self, keys: Sequence[str]) -> dict[str, TargetRef]:
        """References to the payloads that are here."""
        return self._store.get(keys)

    @ray.method
    def has(self, key: str, num_rows: int) -> bool:
        """Whether a payload is here. If so, it is kept until it is fetched.

        One of `num_rows` rows is taken from the library if the store has none.
        """
        if self._store.expect(key):
            return True
        if self._library is None:
            return False
        found = self._library.get(key, num_rows)
        if found is None:
            return False
        report, payload = found
        # Only what other runs see is in a library, so it is of the data.
        return self._store.put(key, ray.put(payload), report.nbytes, recurs=True)

    @ray.method
    def is_kept(self, key: str, num_rows: int) -> bool:
        """Whether the library has a payload of so many rows, which stays there."""
        return self._library is not None and self._library.holds(key, num_rows)

    @ray.method
    def flush(self) -> None:
        """Write what the library has collected."""
        if self._library is not None:
            self._library.flush()

    @ray.method
    def drop(self, keys: Sequence[str]) -> None:
        """Forget payloads that turned out to be lost."""
        self._store.drop(keys)

    @ray.method
    def counters(self) -> StoreCounters:
        """What the store holds, and what its library gave."""
        counters, library = self._store.counters, self._library
        if library is None:
            return counters
        return dataclasses.replace(
            counters, library=library.counters, warnings=library.take_warnings()
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScorerStarter:
    """Starts the processes of the teacher's pool; they load nothing yet."""

    spec: RoleSpec
    teacher: TeacherConfig
    targets: TargetsConfig
    vocabulary_size: int
    device: Device

    def start_one(self) -> ActorProxy[ScorerActor]:
        """One more process."""
        actor = pooled(ScorerActor, self.spec, self.device)
        return actor.remote(self.teacher, self.targets, self.vocabulary_size, self.device)

    def start(self) -> list[ActorProxy[ScorerActor]]:
        """Those that the pool has from its start on."""
        return [self.start_one() for _ in range(self.spec.count)]


def start_stores(
    config: TargetsConfig, library: LibrarySettings | None, *, max_fetched: int | None
) -> list[ActorProxy[TargetStoreActor]]:
    """Start the target stores, spread over the nodes, in front of a library if there is one.

    `max_fetched` is of all stores together; None: no limit but that of the bytes.
    """
    actor = spread(TargetStoreActor, retries=_STORE_RETRIES)
    count, each = config.stores, config.limit // config.stores
    if max_fetched is not None:
        # Keys are spread by a hash, so a store may have more than its share.
        max_fetched = min(max_fetched, max_fetched // count + 4 * math.isqrt(max_fetched))
    return [actor.remote(each, library, index, count, max_fetched) for index in range(count)]


def flush_stores(stores: Sequence[ActorProxy[TargetStoreActor]]) -> tuple[str, ...]:
    """Have their libraries write what they have collected; returns the warnings.

    A store that is gone takes some targets along, which will be scored again.
    """
    for store in stores:
        store.flush.remote()
    calls = [store.counters.remote() for store in stores]  # a store's calls run in order
    warnings: tuple[str, ...] = ()
    for index, call in enumerate(calls):
        with contextlib.suppress(RayError, ClusterError):
            warnings += ask(call, f"target store {index}", timeout_s=STORE_SILENCE_S).warnings
    return warnings


def store_index(key: str, num_stores: int) -> int:
    """Which store owns a target: the same in every process and in every run."""
    return zlib.crc32(key.encode()) % num_stores


# ---- the orchestrator's side ---------------------------------------------------------------------


class ScorerPool(ElasticPool[ScorerActor]):
    """Scorers in front of the target stores. Payloads go from scorer to store by reference."""

    def __init__(
        self,
        handles: Sequence[ActorProxy[ScorerActor]],
        stores: Sequence[ActorProxy[TargetStoreActor]],
        identity: TargetIdentity,
        *,
        stall_timeout_s: float,
        startup_timeout_s: float,
        log: AsyncLog,
        min_actors: int = 1,
        timeline: Timeline | None = None,
        starter: ScorerStarter | None = None,
    ) -> None:
        """The pool grows by `starter`, if the teacher has a range of actors."""
        growth = None
        if starter is not None and isinstance(starter.teacher.actors, ActorRange):
            growth = Growth(
                bounds=starter.teacher.actors, places=REQUESTS_PER_SCORER, add=starter.start_one
            )
        super().__init__(
            handles,
            role="scorer",
            max_in_flight=REQUESTS_PER_SCORER,
            stall_timeout_s=stall_timeout_s,
            startup_timeout_s=startup_timeout_s,
            log=log,
            min_actors=min_actors,
            timeline=timeline,
            growth=growth,
        )
        self._num_stores = len(stores)
        self._stores = StoreCalls(stores, log=log)
        self._identity = identity
        self.scoring = BusyClock()
        self._under_way: dict[str, asyncio.Future[None]] = {}

    async def ensure(self, rollout: Rollout) -> int:
        """Have the targets of a sequence stored; returns the tokens that the teacher computed.

        0 means that a store or its library had them. Equal sequences are never scored twice at
        once.

        Raises:
            ClusterError: a store or a scorer fails too often.
        """
        report = await self._score_unless(
            lambda store, key: store.has.remote(key, rollout.num_loss_tokens), rollout
        )
        return 0 if report is None else report.num_tokens

    async def keep(self, rollout: Rollout) -> ScoreReport | None:
        """Have the targets of a sequence in the library; None if they were there.

        Raises:
            ClusterError: as in `ensure`.
        """
        return await self._score_unless(
            lambda store, key: store.is_kept.remote(key, rollout.num_loss_tokens), rollout
        )

    async def _score_unless(
        self,
        is_there: Callable[[ActorProxy[TargetStoreActor], str], Awaitable[bool]],
        rollout: Rollout,
    ) -> ScoreReport | None:
        key = target_key(self._identity, rollout)
        while key in self._under_way:
            await asyncio.wait((self._under_way[key],))
        done = self._under_way[key] = asyncio.get_running_loop().create_future()
        index = store_index(key, self._num_stores)
        try:
            while True:
                with contextlib.suppress(StoreLost):
                    if await self._stores.call(index, lambda store: is_there(store, key)):
                        return None
                    return await self._score_and_store(rollout, index, key)
        finally:
            del self._under_way[key]
            done.set_result(None)

    async def _score_and_store(self, rollout: Rollout, index: int, key: str) -> ScoreReport:
        """Only the report is awaited here; the payload does not pass through this process."""
        with self.scoring.running():
            report, payload_ref = await self.call_until_done(
                f"sequence {rollout.rollout_id}", lambda handle: _score(handle, rollout)
            )
            shared = is_shared(rollout)
            await self._stores.call(
                index, lambda store: store.put.remote(key, payload_ref, report, shared)
            )
        return report

    async def flush(self) -> None:
        """Have the stores' libraries write what they have collected."""
        await asyncio.gather(*(self._flush(index) for index in range(self._num_stores)))

    async def _flush(self, index: int) -> None:
        with contextlib.suppress(StoreLost):
            await self._stores.call(index, lambda store: store.flush.remote())

    async def counters(self) -> list[StoreCounters]:
        """What each store holds; nothing where it is being replaced."""
        return list(
            await asyncio.gather(*(self._counters(index) for index in range(self._num_stores)))
        )

    async def _counters(self, index: int) -> StoreCounters:
        try:
            return await self._stores.call(index, lambda store: store.counters.remote())
        except StoreLost:
            return StoreCounters(nbytes=0, evictions=0)


async def _score(
    scorer: ActorProxy[ScorerActor], rollout: Rollout
) -> tuple[ScoreReport, ray.ObjectRef[TeacherTargets]]:
    """The report, and a reference to the payload."""
    # With num_returns=2 Ray returns a list of references, which its annotations do not know.
    report_ref, payload_ref = cast(Any, scorer.score.remote(rollout))
    return await report_ref, payload_ref


# ---- the learners' side --------------------------------------------------------------------------


class TargetReader:
    """Fetches the targets of a step. Called from a rank's prefetching thread."""

    def __init__(
        self,
        stores: Sequence[ActorProxy[TargetStoreActor]],
        identity: TargetIdentity,
        score: Callable[[Sequence[Rollout]], None],
        *,
        max_bytes: int,
    ) -> None:
        """`score` has the targets of sequences stored again; `max_bytes` is for a message."""
        self._stores = stores
        self._identity = identity
        self._score = score
        self._max_bytes = max_bytes

    def fetch(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherTargets]:
        """The targets of every rollout, by rollout id. What no store has is scored again.

        Raises:
            ClusterError: the stores lose targets as fast as they are scored.
        """
        keys = {rollout.rollout_id: target_key(self._identity, rollout) for rollout in rollouts}
        targets: dict[str, TeacherTargets] = {}
        missing = list(rollouts)
        for _ in range(MAX_SCORING_ROUNDS):
            by_key = self._from_stores(sorted({keys[one.rollout_id] for one in missing}))
            for one in missing:
                if (found := by_key.get(keys[one.rollout_id])) is not None:
                    targets[one.rollout_id] = found
            missing = [one for one in missing if one.rollout_id not in targets]
            if not missing:
                return targets
            self._score(missing)
        raise ClusterError(
            f"{len(missing)} teacher targets were gone again after being scored"
            f" {MAX_SCORING_ROUNDS} times, {missing[0].rollout_id} among them: targets.max_bytes ="
            f" {self._max_bytes} does not hold the targets of a step; raise it"
        )

    def start_flush(self) -> None:
        """Have the stores' libraries write what they have collected; does not wait for it."""
        for store in self._stores:
            store.flush.remote()

    def _from_stores(self, keys: Sequence[str]) -> dict[str, TeacherTargets]:
        """What the stores have, each asked once. A payload that cannot be read is dropped there.

        A store that does not reply has nothing: the orchestrator, which is then asked to have its
        targets scored again, replaces it.
        """
        by_store: dict[int, list[str]] = {}
        for key in keys:
            by_store.setdefault(store_index(key, len(self._stores)), []).append(key)
        calls = {index: self._stores[index].get.remote(part) for index, part in by_store.items()}
        found: dict[str, tuple[int, TargetRef]] = {}
        for index, call in calls.items():
            for key, reference in self._reply(index, call, dict[str, TargetRef]()).items():
                found[key] = index, reference
        references = [reference for _, reference in found.values()]
        ready, late = ray.wait(references, num_returns=len(references), timeout=CALL_TIMEOUT_S)
        if not late:
            with contextlib.suppress(RayError):  # raised at the first payload that is lost
                payloads = ray.get(references, timeout=CALL_TIMEOUT_S)
                return dict(zip(found, payloads, strict=True))
        return self._one_by_one(found, set(ready))

    def _one_by_one(
        self, found: dict[str, tuple[int, TargetRef]], ready: set[TargetRef]
    ) -> dict[str, TeacherTargets]:
        targets: dict[str, TeacherTargets] = {}
        for key, (index, reference) in found.items():
            with contextlib.suppress(RayError):
                if reference in ready:
                    targets[key] = ray.get(reference, timeout=CALL_TIMEOUT_S)
                    continue
            self._reply(index, self._stores[index].drop.remote([key]), None)
        return targets

    def _reply(self, index: int, call: ray.ObjectRef[Reply], otherwise: Reply) -> Reply:
        """What a store replies, or `otherwise` if it fails or does not."""
        try:
            return ask(call, f"target store {index}", timeout_s=STORE_SILENCE_S)
        except (ClusterError, RayError):
            return otherwise
