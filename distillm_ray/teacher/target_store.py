"""TargetStore: teacher targets by key (`target_key`), bounded in bytes.

Targets are a cache: the teacher is frozen, so a sequence whose targets are missing is scored again
and gets the same targets under the same key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from distillm_ray.teacher.target_library import NO_LIBRARY, LibraryCounters

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCounters:
    """What a store holds now, and what it has evicted since it started."""

    nbytes: int
    evictions: int  # values removed to make room for newer ones
    library: LibraryCounters = NO_LIBRARY  # of the library behind it, if it has one
    warnings: tuple[str, ...] = ()  # of the library, since the counters were read last


class TargetStore(Generic[Value]):
    """Evicts the least recently used value first. Values are opaque: arrays, or references to them.

    Not safe for threads: the actor around it runs one call at a time.
    """

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` bounds the sum of the sizes given to `put`."""
        if max_bytes < 1:
            raise ValueError(
                f"a target store needs at least one byte, got max_bytes = {max_bytes}: every"
                " sequence would be scored again at each visit"
            )
        self.max_bytes = max_bytes
        self._values: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self._nbytes = 0
        self._evictions = 0

    def put(self, key: str, value: Value, nbytes: int) -> bool:
        """Keep a value as the most recently used one; it replaces an earlier value of the key.

        Returns False for a value larger than the whole store, which is not kept and evicts nothing.
        """
        assert nbytes >= 0, f"{key}: a size cannot be negative, got {nbytes}"
        self.drop((key,))
        if nbytes > self.max_bytes:
            return False
        while self._nbytes + nbytes > self.max_bytes:
            _, (_, freed) = self._values.popitem(last=False)
            self._nbytes -= freed
            self._evictions += 1
        self._values[key] = (value, nbytes)
        self._nbytes += nbytes
        return True

    def get(self, keys: Iterable[str]) -> dict[str, Value]:
        """The values that are here, now the most recently used; missing keys are absent."""
        found: dict[str, Value] = {}
        for key in keys:
            if (entry := self._values.get(key)) is not None:
                self._values.move_to_end(key)
                found[key] = entry[0]
        return found

    def drop(self, keys: Iterable[str]) -> None:
        """Forget values that turned out to be lost; missing keys are ignored."""
        for key in keys:
            if (entry := self._values.pop(key, None)) is not None:
                self._nbytes -= entry[1]

    def __contains__(self, key: str) -> bool:
        """Whether a value is here, without counting as a use."""
        return key in self._values

    @property
    def counters(self) -> StoreCounters:
        """A snapshot."""
        return StoreCounters(nbytes=self._nbytes, evictions=self._evictions)
