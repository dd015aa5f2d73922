"""Fresh rollouts by ordinal: what was demanded, what is in flight, what is finished.

An ordinal belongs to one prompt for ever, and to the first step that takes it. The ordinals in
[first, end) are demanded and not drawn yet; each is queued, in flight or finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from distillm_ray.replay.draw import EpochOrder, Stream
from distillm_ray.types import Demand, Prompt, Rollout


class Ordinals:
    """The ledger of demanded ordinals."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        """Nothing is demanded yet."""
        self._prompts = prompts
        self._order = EpochOrder(seed=seed, stream=Stream.PROMPTS, size=len(prompts))
        self._first = 0
        self._end = 0
        self._open: dict[int, Demand] = {}  # queued or in flight
        self._queued: dict[int, None] = {}  # an ordered set
        self._finished: dict[int, Rollout] = {}
        self.lost = 0
        self.duplicates = 0

    @property
    def first(self) -> int:
        """The next ordinal that a step will take."""
        return self._first

    @property
    def end(self) -> int:
        """The next ordinal that was never demanded."""
        return self._end

    @property
    def num_open(self) -> int:
        """Ordinals that are queued or in flight."""
        return len(self._open)

    @property
    def num_finished(self) -> int:
        """Ordinals that are finished and not drawn yet."""
        return len(self._finished)

    def open_until(self, end: int, *, min_version: int) -> None:
        """Demand all ordinals below `end` that were not demanded before."""
        for index, ordinal in zip(
            self._order.indices(self._end, end), range(self._end, end), strict=True
        ):
            self._open[ordinal] = Demand(
                ordinal=ordinal, prompt=self._prompts[index], min_version=min_version
            )
            self._queued[ordinal] = None
        self._end = max(self._end, end)

    def take(self) -> list[Demand]:
        """Everything queued, in order; it is in flight from now on."""
        taken = [self._open[ordinal] for ordinal in self._queued]
        self._queued.clear()
        return taken

    def finish(self, rollout: Rollout) -> None:
        """A rollout for an ordinal. One that nobody waits for is ignored and counted."""
        assert rollout.ordinal is not None, f"{rollout.rollout_id} answers no demand"
        demand = self._open.pop(rollout.ordinal, None)
        if demand is None:
            self.duplicates += 1
            return
        assert rollout.prompt_id == demand.prompt.prompt_id, (
            f"ordinal {rollout.ordinal} is for prompt {demand.prompt.prompt_id},"
            f" got {rollout.prompt_id}"
        )
        self._queued.pop(rollout.ordinal, None)
        self._finished[rollout.ordinal] = rollout

    def lose(self, ordinal: int) -> None:
        """An ordinal in flight will not finish: queue it again. Others need nothing."""
        if ordinal not in self._open or ordinal in self._queued:
            return
        self.lost += 1
        demand = self._open[ordinal]
        self._open[ordinal] = replace(demand, attempt=demand.attempt + 1)
        self._queued[ordinal] = None

    def missing(self, count: int) -> list[int]:
        """Which of the next `count` ordinals are not finished."""
        ordinals = range(self._first, self._first + count)
        return [ordinal for ordinal in ordinals if ordinal not in self._finished]

    def draw(self, count: int) -> tuple[Rollout, ...]:
        """Take the next `count` ordinals, in order: the same whichever finished first."""
        stop = self._first + count
        assert stop <= self._end
        drawn = tuple(self._finished.pop(ordinal) for ordinal in range(self._first, stop))
        self._first = stop
        return drawn

    def outstanding(self) -> tuple[Demand, ...]:
        """Queued or in flight, by ordinal."""
        return tuple(self._open[ordinal] for ordinal in sorted(self._open))

    def finished(self) -> tuple[Rollout, ...]:
        """Finished and not drawn yet, by ordinal."""
        return tuple(self._finished[ordinal] for ordinal in sorted(self._finished))

    def restore(
        self,
        *,
        first: int,
        end: int,
        finished: Iterable[Rollout],
        outstanding: Iterable[tuple[int, str, int, int]],
    ) -> None:
        """Take over [first, end) of a saved ledger; nothing of it is in flight any more.

        `outstanding` holds (ordinal, prompt id, min_version, attempt). Raises ValueError where
        the prompts are not the saved ones.
        """
        self._first = first
        self._end = end
        self._open.clear()
        self._queued.clear()
        self._finished = {
            rollout.ordinal: rollout
            for rollout in finished
            if rollout.ordinal is not None and rollout.ordinal < end
        }
        for ordinal, prompt_id, min_version, attempt in outstanding:
            if ordinal >= end:
                continue
            prompt = self._prompts[self._order.indices(ordinal, ordinal + 1)[0]]
            if prompt.prompt_id != prompt_id:
                raise ValueError(
                    f"the prompts must be those of the saved buffer, got {prompt.prompt_id!r} for"
                    f" ordinal {ordinal} instead of {prompt_id!r}: the run would train on other"
                    " prompts than it began with; restore the data files, or start a new run"
                )
            self._open[ordinal] = Demand(
                ordinal=ordinal, prompt=prompt, min_version=min_version, attempt=attempt
            )
            self._queued[ordinal] = None
