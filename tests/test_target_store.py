"""The target store: it evicts the least recently used value and keeps to its bytes."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillm_ray.teacher.target_store import StoreCounters, TargetStore


def test_the_least_recently_used_value_is_evicted_first() -> None:
    store: TargetStore[str] = TargetStore(max_bytes=30)
    for name in ("a", "b", "c"):
        assert store.put(name, name.upper(), 10)
    assert store.get(["a"]) == {"a": "A"}
    store.put("d", "D", 10)
    assert store.get(["a", "b", "c", "d"]) == {"a": "A", "c": "C", "d": "D"}
    assert store.counters == StoreCounters(nbytes=30, evictions=1)


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


def test_a_membership_test_does_not_count_as_a_use() -> None:
    store: TargetStore[str] = TargetStore(max_bytes=20)
    store.put("a", "A", 10)
    store.put("b", "B", 10)
    assert "a" in store
    store.put("c", "C", 10)
    assert "a" not in store


def test_a_store_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes = 0: every sequence would be scored again"):
        TargetStore(max_bytes=0)


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 45)), max_size=60),
)
def test_it_behaves_like_a_list_in_order_of_use(
    max_bytes: int, calls: list[tuple[bool, int, int]]
) -> None:
    store: TargetStore[int] = TargetStore(max_bytes=max_bytes)
    model: OrderedDict[str, tuple[int, int]] = OrderedDict()
    for serial, (is_put, number, nbytes) in enumerate(calls):
        name = str(number)
        if is_put:
            model.pop(name, None)
            if nbytes <= max_bytes:
                while sum(size for _, size in model.values()) + nbytes > max_bytes:
                    model.popitem(last=False)
                model[name] = (serial, nbytes)
            assert store.put(name, serial, nbytes) == (nbytes <= max_bytes)
        else:
            found = store.get([name])
            assert found == ({name: model[name][0]} if name in model else {})
            if name in model:
                model.move_to_end(name)
        assert store.counters.nbytes == sum(size for _, size in model.values()) <= max_bytes
