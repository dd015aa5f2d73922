"""When a pool grows and shrinks: the rules at their edges, and whole runs of a simulated load."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm_ray.cluster.elasticity import (
    FIRST_PAUSE_S,
    LOADED,
    LONGEST_PATIENCE,
    WAITING,
    Elasticity,
    Look,
)

POOL = Elasticity(fewest=2, most=16, places=4, grow_after_s=30.0, shrink_after_s=120.0)


def looked(
    pool: Elasticity,
    *,
    seconds: float,
    ready: int = 2,
    calls: float = 0.0,
    peak: int | None = None,
    waiting: float = 0.0,
    every: float = 5.0,
    **facts: Any,  # fields of the looks
) -> tuple[Elasticity, int]:
    """The decision after so long at a steady load; the first one that changes the size."""
    start = pool.looks[-1].time if pool.looks else 0.0
    before = pool.looks[-1].waited_s if pool.looks else 0.0
    for step in range(int(seconds / every) + 1):
        time = step * every
        look = Look(
            time=start + time,
            waited_s=before + waiting * time,
            call_seconds=calls * time,
            peak=math.ceil(calls) if peak is None else peak,
            ready=ready,
        )
        pool, change = pool.after(replace(look, **facts))
        if change:
            return pool, change
    return pool, 0


# ---- growth --------------------------------------------------------------------------------------


def test_a_pool_grows_once_the_learners_have_waited_and_calls_were_beyond_its_places() -> None:
    assert looked(POOL, seconds=25, calls=12, waiting=1.0)[1] == 0
    assert looked(POOL, seconds=30, calls=12, waiting=1.0)[1] == 1
    assert looked(POOL, seconds=30, calls=16, waiting=1.0)[1] == 2


@pytest.mark.parametrize(("share", "grows"), [(0.0, 0), (0.9 * WAITING, 0), (1.1 * WAITING, 1)])
def test_without_waiting_learners_no_queue_is_long_enough(share: float, grows: int) -> None:
    assert looked(POOL, seconds=90, calls=12, waiting=share)[1] == grows


def test_learners_that_wait_for_something_else_add_no_member() -> None:
    assert looked(POOL, seconds=90, calls=8, waiting=1.0)[1] == 0


def test_a_short_peak_in_every_step_of_a_strictly_on_policy_run_counts() -> None:
    assert looked(POOL, seconds=30, calls=1, peak=12, waiting=0.5)[1] == 1


def test_a_pool_at_most_doubles_and_never_exceeds_its_maximum() -> None:
    assert looked(POOL, seconds=30, calls=1000, waiting=1.0)[1] == 2
    assert looked(POOL, seconds=30, ready=10, calls=1000, waiting=1.0)[1] == 6
    assert looked(POOL, seconds=90, ready=16, calls=1000, waiting=1.0)[1] == 0


def test_members_that_have_no_room_yet_are_not_asked_for_twice() -> None:
    assert looked(POOL, seconds=90, calls=1000, waiting=1.0, starting=2)[1] == 0
    assert looked(POOL, seconds=90, calls=1000, waiting=1.0, starting=1)[1] == 1


def test_members_that_may_come_back_count_against_the_maximum() -> None:
    assert looked(POOL, seconds=30, ready=10, calls=1000, waiting=1.0, missing=4)[1] == 2


def test_the_members_that_work_are_not_released_for_those_that_are_missing() -> None:
    assert looked(POOL, seconds=600, ready=1, calls=1, missing=2)[1] == 0
    assert looked(POOL, seconds=600, ready=4, calls=1, missing=2)[1] == -2


def test_growth_pauses_after_a_start_that_failed_and_longer_after_several() -> None:
    facts: dict[str, Any] = {"calls": 1000.0, "waiting": 1.0, "failed_at": 0.0}
    for failures, pause_s in ((1, FIRST_PAUSE_S), (3, 4 * FIRST_PAUSE_S)):
        assert looked(POOL, seconds=pause_s - 5, failed_starts=failures, **facts)[1] == 0
        assert looked(POOL, seconds=pause_s, failed_starts=failures, **facts)[1] == 2


def test_a_restart_of_the_learners_begins_the_evidence_anew() -> None:
    pool, _ = looked(POOL, seconds=25, calls=12, waiting=1.0)
    again = Look(time=30.0, waited_s=0.0, call_seconds=360.0, peak=12, ready=2)
    pool, change = pool.after(again)
    assert (change, len(pool.looks)) == (0, 1)


# ---- shrinkage -----------------------------------------------------------------------------------


def test_idle_members_are_released_after_the_patience_at_most_half_of_them_at_once() -> None:
    assert looked(POOL, seconds=115, ready=16)[1] == 0
    assert looked(POOL, seconds=120, ready=16)[1] == -8
    assert looked(POOL, seconds=120, ready=3)[1] == -1
    assert looked(POOL, seconds=600, ready=2)[1] == 0


def test_members_without_room_are_given_up_like_idle_ones() -> None:
    assert looked(POOL, seconds=120, ready=2, starting=2)[1] == -2


def test_while_the_learners_wait_all_members_that_a_peak_needs_stay() -> None:
    busy: dict[str, Any] = {"ready": 4, "calls": 1.0, "waiting": 1.0}
    assert looked(POOL, seconds=600, peak=16, **busy)[1] == 0
    assert looked(POOL, seconds=600, peak=12, **busy)[1] == -1


def test_while_they_do_not_wait_members_with_little_to_do_are_released() -> None:
    full = 3 * POOL.places * LOADED  # what three members have at that load
    assert looked(POOL, seconds=600, ready=4, peak=1000, calls=1.01 * full)[1] == 0
    assert looked(POOL, seconds=600, ready=4, peak=1000, calls=full)[1] == -1


# ---- both ----------------------------------------------------------------------------------------


def test_growth_after_shrinkage_doubles_the_patience_up_to_a_limit() -> None:
    pool, patience = POOL, []
    for _ in range(8):
        pool, change = looked(pool, seconds=1e5, ready=4)
        assert change < 0
        pool, change = looked(pool, seconds=90, ready=2, calls=16, waiting=1.0)
        assert change > 0
        patience.append(pool.patience)
    assert patience == [2, 4, 8, 16, 16, 16, 16, 16] and LONGEST_PATIENCE == 16


@dataclass
class Simulated:
    """A pool that has room for `room` members, under a load of calls that never changes."""

    pool: Elasticity
    load: int
    waiting: float  # share of time while a call has no place
    room: int

    def sizes(self, seconds: int) -> list[int]:
        """The members that work, at each look."""
        ready = wanted = self.pool.fewest
        waited_s, sizes = 0.0, []
        for time in range(0, seconds, 10):
            waited_s += 10 * self.waiting * (self.load > ready * self.pool.places)
            self.pool, change = self.pool.after(
                Look(
                    time=time,
                    waited_s=waited_s,
                    call_seconds=self.load * time,
                    peak=self.load,
                    ready=ready,
                    starting=wanted - ready,
                )
            )
            wanted += change
            assert self.pool.fewest <= wanted <= self.pool.most
            ready = min(wanted, self.room)
            sizes.append(ready)
        return sizes


BOUNDS = st.tuples(st.integers(1, 8), st.integers(0, 12)).map(lambda two: (two[0], sum(two)))


@settings(max_examples=50)
@given(
    bounds=BOUNDS,
    places=st.integers(1, 64),
    load=st.integers(0, 500),
    waiting=st.floats(0.0, 1.0),
    room=st.integers(1, 20),
)
def test_at_a_steady_load_a_pool_settles_within_its_bounds(
    bounds: tuple[int, int], places: int, load: int, waiting: float, room: int
) -> None:
    fewest, most = bounds
    pool = Elasticity(
        fewest=fewest, most=most, places=places, grow_after_s=30.0, shrink_after_s=120.0
    )
    room = max(room, fewest)
    sizes = Simulated(pool, load, waiting, room).sizes(800)
    assert sizes == sorted(sizes), "a steady load never needs fewer members than before"
    assert len(set(sizes[-50:])) == 1, "it has settled"
    if waiting >= 2 * WAITING:
        assert sizes[-1] == min(max(math.ceil(load / places), fewest), most, room)
    if waiting < WAITING / 2:
        assert sizes[-1] == fewest


@settings(max_examples=50)
@given(
    bounds=BOUNDS,
    looks=st.lists(
        st.tuples(
            st.floats(0.1, 60.0),  # seconds
            st.floats(0.0, 1.0),  # share of waiting
            st.integers(0, 200),  # calls
            st.integers(0, 20),  # of the members: ready
            st.integers(0, 4),  # missing
        ),
        max_size=80,
    ),
)
def test_no_load_moves_a_pool_out_of_its_bounds_or_twice_without_evidence_between(
    bounds: tuple[int, int], looks: list[tuple[float, float, int, int, int]]
) -> None:
    fewest, most = bounds
    pool = Elasticity(fewest=fewest, most=most, places=4, grow_after_s=30.0, shrink_after_s=120.0)
    time = waited_s = call_seconds = 0.0
    wanted, changed_at = fewest, -math.inf
    for seconds, waiting, calls, some, gone in looks:
        time += seconds
        waited_s += waiting * seconds
        call_seconds += calls * seconds
        ready = min(some, wanted)
        missing = min(gone, wanted - ready)
        patience_s = pool.patience_s
        pool, change = pool.after(
            Look(
                time=time,
                waited_s=waited_s,
                call_seconds=call_seconds,
                peak=calls,
                ready=ready,
                starting=wanted - ready - missing,
                missing=missing,
            )
        )
        if change:
            needed_s = pool.grow_after_s if change > 0 else patience_s
            assert time - changed_at >= needed_s
            changed_at = time
        wanted += change
        assert fewest <= wanted <= most
        assert pool.patience <= LONGEST_PATIENCE
