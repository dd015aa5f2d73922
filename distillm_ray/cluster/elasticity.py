"""How large an elastic pool should be: facts in, decision out. No clock, no I/O.

A pool is looked at again and again. It grows if the learners have waited for `WAITING` of the last
`grow_after_s` and, at a peak in that time, the pool had more calls than its members work on at
once: the calls beyond that are in a queue, which another member would shorten. It shrinks if
fewer members would have been enough for all of the last `patience_s`:

    while the learners wait     enough for the peak; the pool would ask for them again
    while they do not           enough for the mean, at a load of `LOADED`

The two rules leave a gap between them, and each change of size forgets what was seen before it, so
a pool at a steady load settles. Where growth follows a shrinkage, the load is one at which the
smaller pool was too small after all: the patience doubles, up to `LONGEST_PATIENCE` times the
configured one. A pool at most doubles, counted in members that work, and at most halves.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

WAITING = 0.1
"""Share of the time that the learners wait, from which the pool is too small for them."""
LOADED = 0.5
"""Mean share of its places that a member has filled, up to which fewer members are enough."""
LONGEST_PATIENCE = 16
FIRST_PAUSE_S = 30.0  # of growth, after a member that could not start
LONGEST_PAUSE_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A pool at one time. Members that are being drained are not counted."""

    time: float  # seconds, of any clock that does not go back
    waited_s: float  # by the learners, so far; falls where they start again
    call_seconds: float  # so far, summed over all calls, those in the queue included
    peak: int  # most calls at a time since the look before
    ready: int
    starting: int = 0  # they wait for room in the cluster, or load their model
    missing: int = 0  # the pool does not count on these, but they may come back
    failed_starts: int = 0  # of members that the pool has added, in a row
    failed_at: float = -math.inf  # the time of the last of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Elasticity:
    """The bounds of a pool, and what was seen since its size last changed.

    Example: two members with four places each have twelve calls, and the learners wait.
        >>> pool = Elasticity(fewest=1, most=8, places=4, grow_after_s=30, shrink_after_s=120)
        >>> for seconds in (0, 15, 30):
        ...     look = Look(
        ...         time=seconds, waited_s=seconds, call_seconds=12 * seconds, peak=12, ready=2
        ...     )
        ...     pool, change = pool.after(look)
        >>> change
        1
    """

    fewest: int
    most: int
    places: int  # calls that one member works on at the same time
    grow_after_s: float
    shrink_after_s: float
    looks: tuple[Look, ...] = ()  # since the last change, as far back as a decision reads
    patience: int = 1  # in units of shrink_after_s
    has_shrunk: bool = False  # by the last change

    @property
    def patience_s(self) -> float:
        """For how long members must have been idle."""
        return self.patience * self.shrink_after_s

    def after(self, look: Look) -> tuple[Elasticity, int]:
        """With one more look; and how many members to add (above 0) or to release (below 0)."""
        looks = (*self.looks, look)
        if self.looks and look.waited_s < self.looks[-1].waited_s:
            looks = (look,)  # the learners have started again, and their clock with them
        seen = replace(self, looks=looks)._forgetting()
        if added := seen._growth():
            doubled = min(2 * self.patience, LONGEST_PATIENCE)
            patience = doubled if self.has_shrunk else self.patience
            return replace(seen, looks=(), patience=patience, has_shrunk=False), added
        if released := seen._shrinkage():
            return replace(seen, looks=(), has_shrunk=True), -released
        return seen, 0

    def _growth(self) -> int:
        window = self._since(self.grow_after_s)
        if window is None or not _waits(window):
            return 0
        now = window[-1]
        pause_s = min(FIRST_PAUSE_S * 2 ** min(now.failed_starts - 1, 10), LONGEST_PAUSE_S)
        if now.failed_starts and now.time - now.failed_at < pause_s:
            return 0
        there = now.ready + now.starting
        wanted = min(self._enough_for(_peak(window)), 2 * max(now.ready, 1))
        return max(min(wanted, self.most - now.missing) - there, 0)

    def _shrinkage(self) -> int:
        window = self._since(self.patience_s)
        if window is None:
            return 0
        now = window[-1]
        there = now.ready + now.starting  # who is missing does no work that another could take over
        enough = self._enough_for(_peak(window))
        if not _waits(window):
            enough = min(enough, self._enough_for(_mean_calls(window) / LOADED))
        return max(there - max(enough, self.fewest, math.ceil(there / 2)), 0)

    def _enough_for(self, calls: float) -> int:
        return math.ceil(calls / self.places)

    def _since(self, seconds: float) -> tuple[Look, ...] | None:
        """The looks of the last so many seconds; None if they do not reach back so far."""
        start = self.looks[-1].time - seconds
        after = bisect_right(self.looks, start, key=lambda look: look.time)
        return self.looks[after - 1 :] if after else None

    def _forgetting(self) -> Elasticity:
        """Without the looks that no decision reads any more."""
        window = self._since(max(self.grow_after_s, self.patience_s))
        return self if window is None else replace(self, looks=window)


def _waits(window: tuple[Look, ...]) -> bool:
    first, last = window[0], window[-1]
    return last.waited_s - first.waited_s >= WAITING * (last.time - first.time)


def _peak(window: tuple[Look, ...]) -> int:
    """A look's peak is of the time before it, and the first look's of a time before the window."""
    return max(look.peak for look in window[1:])


def _mean_calls(window: tuple[Look, ...]) -> float:
    first, last = window[0], window[-1]
    return (last.call_seconds - first.call_seconds) / (last.time - first.time)
