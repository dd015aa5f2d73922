"""Teacher targets on the cluster: the scorer pool, target stores and the learners' reader."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ray

from distillm_ray.cluster import store_calls
from distillm_ray.cluster import targets as cluster_targets
from distillm_ray.cluster.learner import Links
from distillm_ray.cluster.targets import ScorerPool, store_index
from distillm_ray.errors import ClusterError, ModelError
from distillm_ray.log.records import Record
from distillm_ray.teacher.target_key import target_key
from distillm_ray.teacher.target_store import StoreCounters
from distillm_ray.types import HiddenTargets, Rollout, ScoreReport, TeacherTargets
from tests.integration.actors import (
    IDENTITY,
    Actor,
    Events,
    events,
    get,
    kill_and_await_restart,
    remote,
    remote_log,
    remote_stores,
    small_config,
    start_links,
)
from tests.integration.fakes import HIDDEN_SIZE, FakeScorer, rollout

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


# ---- the orchestrator's side ---------------------------------------------------------------------


def pool_of(scorers: list[Actor], stores: list[Actor], *, log: Events | None = None) -> ScorerPool:
    return ScorerPool(
        scorers,
        stores,
        IDENTITY,
        stall_timeout_s=60.0,
        startup_timeout_s=120.0,
        log=cast(Any, log or Events()),
    )


def store_of(rollout: Rollout, stores: Sequence[Actor]) -> int:
    """The index of the store that owns the targets of a sequence."""
    return store_index(target_key(IDENTITY, rollout), len(stores))


async def stored(stores: list[Actor], one: Rollout) -> np.ndarray:
    key = target_key(IDENTITY, one)
    references = await stores[store_of(one, stores)].get.remote([key])
    return (await references[key]).values_TD


async def test_targets_survive_the_death_of_their_scorer() -> None:
    scorers, stores = [remote(FakeScorer)], remote_stores(2)
    targets = pool_of(scorers, stores)
    await targets.start()
    assert await targets.ensure(rollout("a", 3)) == 5
    ray.kill(scorers[0])
    values_TD = await stored(stores, rollout("a", 3))
    assert values_TD.shape == (3, HIDDEN_SIZE) and (values_TD == 5).all()
    assert not values_TD.flags.writeable


async def test_concurrent_requests_for_a_sequence_score_it_once() -> None:
    scorer = remote(FakeScorer)
    targets = pool_of([scorer], remote_stores(1))
    await targets.start()
    assert sorted(await asyncio.gather(*(targets.ensure(rollout("a")) for _ in range(5)))) == [
        0,
        0,
        0,
        0,
        3,
    ]
    assert await scorer.count.remote() == 1


async def test_calls_that_a_dying_scorer_loses_are_repeated() -> None:
    scorer = remote(FakeScorer)
    targets = pool_of([scorer], remote_stores(1))
    await targets.start()
    calls = [asyncio.create_task(targets.ensure(rollout(f"a{i}", 1 + i))) for i in range(4)]
    await asyncio.sleep(0.02)
    ray.kill(scorer, no_restart=False)
    assert await asyncio.wait_for(asyncio.gather(*calls), 240) == [3, 4, 5, 6]


class PatientAfterAFailure(Events):
    """The limit on silence is a short one up to the first failure: a new process needs its time."""

    async def add(self, record: Record) -> None:
        store_calls.STORE_SILENCE_S = 60.0
        await super().add(record)


async def test_a_frozen_store_is_replaced_and_the_sequence_scored_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, scorer, stores = PatientAfterAFailure(), remote(FakeScorer), remote_stores(1)
    targets = pool_of([scorer], stores, log=log)
    await targets.start()
    assert await targets.ensure(rollout("a", 3)) == 5
    process = await stores[0].__ray_call__.remote(lambda _: os.getpid())
    os.kill(process, signal.SIGSTOP)
    monkeypatch.setattr(store_calls, "STORE_SILENCE_S", 2.0)
    assert await asyncio.wait_for(targets.counters(), 240) == [StoreCounters(nbytes=0, evictions=0)]
    assert await asyncio.wait_for(targets.ensure(rollout("a", 3)), 240) == 5
    assert (await stored(stores, rollout("a", 3))).shape == (3, HIDDEN_SIZE)
    assert log.names == ["target store 0 failed"]


class FullStore:
    """Raises at its first `put`, in this process or the ones before."""

    def __init__(self, marked: Path) -> None:
        self.marked = marked
        self.keys: list[str] = []

    def has(self, key: str, num_rows: int) -> bool:
        return key in self.keys

    def put(self, key: str, payload: TeacherTargets, report: ScoreReport, shared: bool) -> bool:
        if not self.marked.exists():
            self.marked.touch()
            raise OSError("no space left on device")
        self.keys.append(key)
        return True


async def test_a_failing_put_replaces_the_store_and_is_not_held_against_the_scorer(
    tmp_path: Path,
) -> None:
    log, scorer, store = Events(), remote(FakeScorer), remote(FullStore, tmp_path / "raised")
    targets = pool_of([scorer], [store], log=log)
    await targets.start()
    assert await asyncio.wait_for(targets.ensure(rollout("a", 3)), 240) == 5
    assert await targets.ensure(rollout("a", 3)) == 0
    assert log.names == ["target store 0 failed"]
    assert log.details == ["OSError: no space left on device"]
    assert await scorer.count.remote() == 2, "the same process scored it again"


async def test_another_text_under_the_same_id_has_targets_of_its_own() -> None:
    stores = remote_stores(1)
    targets = pool_of([remote(FakeScorer)], stores)
    await targets.start()
    old, new = rollout("student-0", 2), rollout("student-0", 4)
    assert (await targets.ensure(old), await targets.ensure(new)) == (4, 6)
    assert (await stored(stores, old)).shape == (2, HIDDEN_SIZE)
    assert (await stored(stores, new)).shape == (4, HIDDEN_SIZE)


async def test_equal_text_is_scored_once_for_any_id_and_any_run() -> None:
    """Two rows have the same text, and a second run uses the same stores."""
    scorer, stores = remote(FakeScorer), remote_stores(2)
    first = pool_of([scorer], stores)
    await first.start()
    assert await first.ensure(rollout("dataset-a", 3)) == 5
    assert await first.ensure(rollout("dataset-b", 3, version=7)) == 0
    second = pool_of([scorer], stores)
    await second.start()
    assert await second.ensure(rollout("dataset-c", 3)) == 0
    assert await scorer.count.remote() == 1


# ---- the learners' side --------------------------------------------------------------------------


def fetch(links: Links, rollouts: Sequence[Rollout]) -> dict[str, TeacherTargets]:
    assert links.targets is not None
    return links.targets.fetch(rollouts)


def lengths(targets: dict[str, TeacherTargets]) -> dict[str, int]:
    found = {}
    for name, one in targets.items():
        assert isinstance(one, HiddenTargets)
        found[name] = len(one.values_TD)
    return found


def test_targets_lost_with_their_store_are_scored_again(tmp_path: Path) -> None:
    scorer, stores = remote(FakeScorer), remote_stores(2)
    links, _ = start_links(small_config(tmp_path), [scorer], stores)
    rollouts = [rollout(f"r{index}", 1 + index) for index in range(12)]
    assert {store_of(one, stores) for one in rollouts} == {0, 1}
    expected = {f"r{index}": 1 + index for index in range(12)}
    assert lengths(fetch(links, rollouts)) == expected
    assert lengths(fetch(links, rollouts)) == expected
    assert get(scorer.count.remote()) == 12, "the second fetch finds all targets"
    kill_and_await_restart(stores[1])
    assert lengths(fetch(links, rollouts)) == expected
    lost = sum(store_of(one, stores) == 1 for one in rollouts)
    assert get(scorer.count.remote()) == 12 + lost


def test_a_store_that_does_not_reply_to_a_learner_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, stores = remote(FakeScorer), remote_stores(2)
    links, _ = start_links(small_config(tmp_path), [scorer], stores)
    rollouts = [rollout(f"r{index}", 1 + index) for index in range(12)]
    expected = {f"r{index}": 1 + index for index in range(12)}
    assert lengths(fetch(links, rollouts)) == expected
    process = get(stores[1].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(process, signal.SIGSTOP)
    monkeypatch.setattr(cluster_targets, "STORE_SILENCE_S", 2.0)
    timer = threading.Timer(5.0, ray.kill, (stores[1],), {"no_restart": False})
    timer.start()  # the orchestrator would, after a minute
    assert lengths(fetch(links, rollouts)) == expected


def test_stores_that_cannot_hold_a_step_are_named_with_their_key(tmp_path: Path) -> None:
    stores = remote_stores(1, max_bytes=1000)
    links, _ = start_links(small_config(tmp_path), [remote(FakeScorer)], stores)
    with pytest.raises(
        ClusterError, match=r"1 teacher targets were gone again .* targets\.max_bytes"
    ):
        fetch(links, [rollout("r0")])


def test_a_user_error_of_a_scorer_is_raised_unchanged_in_the_learner(tmp_path: Path) -> None:
    links, _ = start_links(small_config(tmp_path), [remote(FakeScorer)], remote_stores(1))
    with pytest.raises(ModelError) as caught:
        fetch(links, [rollout("r0", text="refuse")])
    assert str(caught.value) == "teacher.model: no good"


def test_a_learner_that_waits_too_long_for_targets_names_the_wait(tmp_path: Path) -> None:
    config = small_config(tmp_path, learner={"data_timeout_s": 0.5})
    links, _ = start_links(config, [remote(FakeScorer)], remote_stores(1))
    with pytest.raises(ClusterError, match=r"no reply within 0\.5 s: scoring 1 sequences"):
        fetch(links, [rollout("r0", text="hang")])


def test_a_scorer_that_hangs_is_replaced_after_teacher_timeout_s(tmp_path: Path) -> None:
    """The default limit, 600 s, is longer than the learner's limit of 60 s."""
    log, hung = remote_log(tmp_path), tmp_path / "hung"
    config = small_config(tmp_path, teacher={"timeout_s": 2.0})
    links, _ = start_links(config, [remote(FakeScorer)], remote_stores(1), log=log)
    found = fetch(links, [rollout("r0", 3, text=f"hang once {hung}")])
    assert lengths(found) == {"r0": 3}
    assert hung.exists()
    failed = events(log)[0]
    assert (failed.name, failed.detail) == ("scorer 0 failed", "TimeoutError: no progress for 2 s")
