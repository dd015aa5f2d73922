"""The target store: what makes room for what, and its bound in bytes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillm_ray.teacher.target_store import StoreCounters, TargetStore, most_fetched
from tests import make


def names(store: TargetStore[Any]) -> str:
    return "".join(name for name in "abcdefgh" if name in store)


def test_of_the_data_what_was_fetched_last_makes_room_first() -> None:
    store: TargetStore[str] = TargetStore(max_bytes=30)
    for name in "abc":
        assert store.put(name, name.upper(), 10, recurs=True)
    assert store.get("ab") == {"a": "A", "b": "B"}
    store.put("d", "D", 10, recurs=True)
    assert names(store) == "acd"
    assert store.counters == StoreCounters(nbytes=30, evictions=1)


def test_the_data_makes_room_before_the_replay_shelf_and_both_before_what_is_awaited() -> None:
    store: TargetStore[str] = TargetStore(max_bytes=40)
    for name in "abcd":
        store.put(name, name, 10, recurs=name == "b")
    store.get("bca")
    left = []
    for name in "efg":
        store.put(name, name, 10)
        left.append(names(store))
    # b is of the data; c was fetched before a; d and what came after it wait.
    assert left == ["acde", "adef", "defg"]
    store.put("h", "h", 10)
    assert names(store) == "efgh"


def test_what_a_coming_step_expects_is_kept_until_it_is_fetched() -> None:
    store: TargetStore[str] = TargetStore(max_bytes=20)
    for name in "ab":
        store.put(name, name, 10, recurs=True)
    store.get("ab")
    assert store.expect("b")
    assert not store.expect("z")
    store.put("c", "c", 10, recurs=True)
    assert names(store) == "bc"


@pytest.mark.parametrize("shuffled", [False, True])
def test_of_a_data_set_twice_as_large_as_the_store_half_of_the_draws_hit(shuffled: bool) -> None:
    """Least recently used first would hit nothing in the order of the files."""
    store: TargetStore[int] = TargetStore(max_bytes=50)
    order = list(range(100))
    hits = []
    for epoch in range(6):
        if shuffled:
            random.Random(epoch).shuffle(order)
        hits.append(0)
        for number in order:
            if store.expect(str(number)):
                hits[-1] += 1
            else:
                store.put(str(number), number, 1, recurs=True)
            store.get([str(number)])
    assert hits[0] == 0
    assert all(49 <= count <= 50 for count in hits[1:])


def test_what_has_left_the_replay_shelf_does_not_push_out_the_data() -> None:
    store: TargetStore[int] = TargetStore(max_bytes=30, max_fetched=10)
    for number in range(20):
        store.put(f"data {number}", number, 1, recurs=True)
        store.get([f"data {number}"])
    for number in range(200):
        store.put(f"student {number}", number, 1)
        store.get([f"student {number}"])
    assert [number for number in range(200) if f"student {number}" in store] == [*range(190, 200)]
    assert sum(f"data {number}" in store for number in range(20)) == 19  # one made room in between
    assert store.counters.evictions == 1


def test_a_replayed_value_keeps_its_place_in_the_line() -> None:
    """The shelf is first in, first out, whatever is drawn from it."""
    store: TargetStore[str] = TargetStore(max_bytes=20)
    for name in "ab":
        store.put(name, name, 10)
        store.get(name)
    store.get("a")
    store.put("c", "c", 10)
    assert names(store) == "bc"


def test_the_shelf_and_the_open_steps_bound_what_the_student_wrote() -> None:
    config = make.config(replay={"capacity": 50}, rollout={"lookahead": 3})
    assert most_fetched(config) == 50 + 3 * config.learner.batch_size
    assert most_fetched(make.config(schedule={"type": "fixed", "phi": 1.0})) is None


def test_a_large_value_evicts_as_many_small_ones_as_it_needs() -> None:
    store: TargetStore[int] = TargetStore(max_bytes=100)
    for index in range(10):
        store.put(str(index), index, 10)
    store.put("large", -1, 45)
    assert [str(index) in store for index in range(10)] == [False] * 5 + [True] * 5
    assert store.counters.nbytes == 95
    assert store.counters.evictions == 5


def test_a_value_larger_than_the_store_is_refused_and_evicts_nothing() -> None:
    store: TargetStore[int] = TargetStore(max_bytes=10)
    store.put("small", 1, 10)
    assert not store.put("large", 2, 11)
    assert "small" in store
    assert store.counters.evictions == 0


def test_a_value_put_again_replaces_the_old_one_and_its_size() -> None:
    store: TargetStore[str] = TargetStore(max_bytes=10)
    store.put("a", "old", 6)
    store.put("a", "new", 8)
    assert store.get(["a"]) == {"a": "new"}
    assert store.counters.nbytes == 8
    assert store.counters.evictions == 0


def test_a_lost_value_that_is_dropped_is_a_miss_and_frees_its_bytes() -> None:
    store: TargetStore[str] = TargetStore(max_bytes=10)
    store.put("a", "A", 6)
    store.drop(["a", "never here"])
    assert store.get(["a"]) == {}
    assert store.counters.nbytes == 0


def test_a_store_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes = 0: every sequence would be scored again"):
        TargetStore(max_bytes=0)


@given(
    st.integers(1, 40),
    st.integers(0, 4),
    st.lists(
        st.tuples(
            st.sampled_from(("put", "get", "expect", "drop")),
            st.integers(0, 9),
            st.integers(0, 45),
            st.booleans(),
        ),
        max_size=60,
    ),
)
def test_it_behaves_like_three_lists(
    max_bytes: int, max_fetched: int, calls: list[tuple[str, int, int, bool]]
) -> None:
    store: TargetStore[int] = TargetStore(max_bytes, max_fetched=max_fetched)
    waiting: list[str] = []
    recurring: list[str] = []
    fetched: list[str] = []
    held: dict[str, tuple[int, int, bool]] = {}

    def remove(name: str) -> None:
        for group in (waiting, recurring, fetched):
            if name in group:
                group.remove(name)

    for serial, (call, number, nbytes, recurs) in enumerate(calls):
        name = str(number)
        match call:
            case "put":
                remove(name)
                held.pop(name, None)
                if nbytes <= max_bytes:
                    while sum(size for _, size, _ in held.values()) + nbytes > max_bytes:
                        victim = recurring[-1] if recurring else (fetched or waiting)[0]
                        remove(victim)
                        del held[victim]
                    held[name] = (serial, nbytes, recurs)
                    waiting.append(name)
                assert store.put(name, serial, nbytes, recurs=recurs) == (nbytes <= max_bytes)
            case "get":
                assert store.get([name]) == ({name: held[name][0]} if name in held else {})
                if name in held and name not in fetched:
                    remove(name)
                    (recurring if held[name][2] else fetched).append(name)
                if len(fetched) > max_fetched:
                    del held[fetched.pop(0)]
            case "expect":
                assert store.expect(name) == (name in held)
                if name in held:
                    remove(name)
                    waiting.append(name)
            case _:
                store.drop([name])
                remove(name)
                held.pop(name, None)
        assert store.counters.nbytes == sum(size for _, size, _ in held.values()) <= max_bytes
        assert {str(one) for one in range(10) if str(one) in store} == held.keys()
