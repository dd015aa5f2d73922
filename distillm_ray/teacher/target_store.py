"""TargetStore: teacher targets by sequence id, bounded in bytes.

Targets are a cache. The teacher is frozen, so what is missing is scored again under the same id.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCounters:
    """What a store holds now, and what happened to it since it started."""

    entries: int
    nbytes: int
    hits: int  # ids that `get` found
    misses: int  # ids that `get` did not find
    evictions: int  # values that went because newer ones needed the bytes
    refused: int  # values larger than the whole store


class TargetStore(Generic[Value]):
    """Least recently used goes first. Values are opaque: arrays, or references to them.

    Not safe for threads: the actor around it answers one call at a time.
    """

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: bound on the sum of the sizes that `put` is told."""
        if max_bytes < 1:
            raise ValueError(
                f"a target store needs at least one byte, got max_bytes = {max_bytes}: every"
                " sequence would be scored again at each visit"
            )
        self.max_bytes = max_bytes
        self._values: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self._nbytes = 0
        self._hits = 0
        self._misses = 0
        self._evictions = 0
        self._refused = 0

    def put(self, rollout_id: str, value: Value, nbytes: int) -> bool:
        """Keep a value as the most recently used one; replaces what the id had.

        False if it is larger than the whole store: it is not kept and nothing else goes.
        """
        assert nbytes >= 0, f"{rollout_id}: a size cannot be negative, got {nbytes}"
        if nbytes > self.max_bytes:
            self._refused += 1
            self.drop((rollout_id,))
            return False
        self.drop((rollout_id,))
        while self._nbytes + nbytes > self.max_bytes:
            _, (_, freed) = self._values.popitem(last=False)
            self._nbytes -= freed
            self._evictions += 1
        self._values[rollout_id] = (value, nbytes)
        self._nbytes += nbytes
        return True

    def get(self, rollout_ids: Iterable[str]) -> dict[str, Value]:
        """The values that are here, now the most recently used; ids not here are absent."""
        found: dict[str, Value] = {}
        for rollout_id in rollout_ids:
            if (entry := self._values.get(rollout_id)) is None:
                self._misses += 1
                continue
            self._values.move_to_end(rollout_id)
            self._hits += 1
            found[rollout_id] = entry[0]
        return found

    def drop(self, rollout_ids: Iterable[str]) -> None:
        """Forget values that turned out to be lost; ids not here are no error."""
        for rollout_id in rollout_ids:
            if (entry := self._values.pop(rollout_id, None)) is not None:
                self._nbytes -= entry[1]

    def __contains__(self, rollout_id: str) -> bool:
        """Whether it is here. Neither a hit nor a use."""
        return rollout_id in self._values

    @property
    def counters(self) -> StoreCounters:
        """A snapshot."""
        return StoreCounters(
            entries=len(self._values),
            nbytes=self._nbytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            refused=self._refused,
        )
