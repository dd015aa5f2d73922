"""TargetStore: teacher targets by key (`target_key`), bounded in bytes.

Targets are a cache: the teacher is frozen, so a sequence whose targets are missing is scored again
and gets the same targets under the same key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from distillm_ray.config import Config
from distillm_ray.teacher.target_library import NO_LIBRARY, LibraryCounters

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCounters:
    """What a store holds now, and what it has evicted since it started."""

    nbytes: int
    evictions: int  # values that may be asked for again, removed to make room for newer ones
    library: LibraryCounters = NO_LIBRARY  # of the library behind it, if it has one
    warnings: tuple[str, ...] = ()  # of the library, since the counters were read last


def most_fetched(config: Config) -> int | None:
    """How many responses of the student may be drawn again after their first step.

    These are on the replay shelf, or in an open step and then on it. None where the data is not
    drawn: nothing that recurs competes with them for the room.
    """
    if not config.draws_data:
        return None
    return config.replay.capacity + config.rollout.open_steps * config.learner.batch_size


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Value]):
    value: Value
    nbytes: int
    recurs: bool


class TargetStore(Generic[Value]):
    """Keeps what will be asked for soonest. Values are opaque: arrays, or references to them.

    A value *waits* from `put` or `expect` until it is fetched by `get`: a coming step needs it.
    What makes room for a new value is, in this order:

    1. values that recur and were fetched, the newest first. A data set is walked through epoch by
       epoch: what was fetched last comes again last, so a fixed part of the data stays. Evicting
       the least recently used value would remove each one just before it is needed.
    2. other values that were fetched, the oldest first, as they leave the replay shelf. There are
       at most `max_fetched` of them: what has left the shelf is not asked for again.
    3. values that wait, the oldest first.

    Not safe for threads: the actor around it runs one call at a time.

    Example:
        >>> store: TargetStore[str] = TargetStore(max_bytes=30)
        >>> for name in "abc":
        ...     _ = store.put(name, name.upper(), 10, recurs=True)
        >>> store.get("ab")
        {'a': 'A', 'b': 'B'}
        >>> store.put("d", "D", 10, recurs=True)
        True
        >>> [name for name in "abcd" if name in store]
        ['a', 'c', 'd']
    """

    def __init__(self, max_bytes: int, *, max_fetched: int | None = None) -> None:
        """`max_bytes` bounds the sum of the sizes given to `put`."""
        if max_bytes < 1:
            raise ValueError(
                f"a target store needs at least one byte, got max_bytes = {max_bytes}: every"
                " sequence would be scored again at each visit"
            )
        self.max_bytes = max_bytes
        self._max_fetched = max_fetched
        # A key is in one of them; each is in the order in which values have come into it.
        self._waiting: OrderedDict[str, _Entry[Value]] = OrderedDict()
        self._recurring: OrderedDict[str, _Entry[Value]] = OrderedDict()
        self._fetched: OrderedDict[str, _Entry[Value]] = OrderedDict()
        self._nbytes = 0
        self._evictions = 0

    def put(self, key: str, value: Value, nbytes: int, *, recurs: bool = False) -> bool:
        """Keep a value, which waits from now on; it replaces an earlier value of the key.

        Returns False for a value larger than the whole store, which is not kept and evicts nothing.

        Args:
            recurs: it is of the data, and asked for again in the next epoch.
        """
        assert nbytes >= 0, f"{key}: a size cannot be negative, got {nbytes}"
        self.drop((key,))
        if nbytes > self.max_bytes:
            return False
        while self._nbytes + nbytes > self.max_bytes:
            self._evict()
        self._waiting[key] = _Entry(value, nbytes, recurs)
        self._nbytes += nbytes
        return True

    def expect(self, key: str) -> bool:
        """Whether a value is here. If so, it waits from now on."""
        entry = self._take(key)
        if entry is not None:
            self._waiting[key] = entry
        return entry is not None

    def get(self, keys: Iterable[str]) -> dict[str, Value]:
        """The values that are here, which wait no longer; missing keys are absent."""
        found: dict[str, Value] = {}
        for key in keys:
            if (entry := self._fetched.get(key)) is None:
                if (entry := self._take(key)) is None:
                    continue
                (self._recurring if entry.recurs else self._fetched)[key] = entry
            found[key] = entry.value
        while self._max_fetched is not None and len(self._fetched) > self._max_fetched:
            _, entry = self._fetched.popitem(last=False)
            self._nbytes -= entry.nbytes
        return found

    def drop(self, keys: Iterable[str]) -> None:
        """Forget values that turned out to be lost; missing keys are ignored."""
        for key in keys:
            if (entry := self._take(key)) is not None:
                self._nbytes -= entry.nbytes

    def __contains__(self, key: str) -> bool:
        """Whether a value is here; nothing changes."""
        return key in self._waiting or key in self._recurring or key in self._fetched

    @property
    def counters(self) -> StoreCounters:
        """A snapshot."""
        return StoreCounters(nbytes=self._nbytes, evictions=self._evictions)

    def _take(self, key: str) -> _Entry[Value] | None:
        for group in (self._waiting, self._recurring, self._fetched):
            if (entry := group.pop(key, None)) is not None:
                return entry
        return None

    def _evict(self) -> None:
        if self._recurring:
            _, entry = self._recurring.popitem(last=True)
        else:
            _, entry = (self._fetched or self._waiting).popitem(last=False)
        self._nbytes -= entry.nbytes
        self._evictions += 1
