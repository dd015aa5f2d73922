"""The window of steps whose fresh rollouts are demanded, as a function of the completed steps.

    completed        0         4         8           sync_interval 4, lookahead 2
    publish          v0        v4        v8
    demand of steps  0 ─── 4   5 ─── 8   9 ─── 12

Demand opens in bursts: at each publication for all the steps that its weights are meant for. So an
engine decodes the requests of a whole interval together, which costs hardly more than those of one
step, and no sample is older than if every step asked for its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """`lookahead` steps ahead of the learner, in bursts of `sync_interval` steps.

    Example:
        >>> window = Window(lookahead=2, sync_interval=4)
        >>> [window.end(completed) for completed in (0, 3, 4, 7, 8)]
        [5, 5, 9, 9, 13]
        >>> [window.opens_after(step) for step in (0, 4, 5, 8, 9)]
        [0, 0, 4, 4, 8]
        >>> window.max_age
        4
    """

    lookahead: int
    sync_interval: int

    def version(self, completed: int) -> int:
        """The newest version that is published by then, where there is demand."""
        return completed // self.sync_interval * self.sync_interval

    def end(self, completed: int) -> int:
        """The first step that is not open once `completed` steps are."""
        return self.version(completed) + self.sync_interval + self.lookahead - 1

    def opens_after(self, step: int) -> int:
        """The number of completed steps with which `step` opens."""
        return max(0, self.version(step + 1 - self.lookahead))

    @property
    def max_age(self) -> int:
        """The largest age of a fresh rollout, in steps: that of the last step of a burst."""
        return self.lookahead + self.sync_interval - 2
