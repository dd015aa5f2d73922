"""The ordinals of fresh rollouts: which are demanded, in flight and finished.

An ordinal numbers one demanded rollout; the first step that takes it trains on it as fresh. Its
prompt is a function of the seed and the ordinal, and changes only where that prompt is given up.
Then it is the first of an order of the ordinal's own that is not: the same one, whichever prompts
were given up first. The ordinals in [first, end) are demanded and not drawn yet; each of them is
queued, in flight or finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from distillm_ray.errors import DataError
from distillm_ray.replay.draw import EpochOrder, Stream, generator
from distillm_ray.types import Demand, Prompt, Rollout


class Ordinals:
    """Tracks every demanded ordinal until a step draws it."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        """Ordinals walk over `prompts` in an order that depends on `seed`; none is demanded yet."""
        self._prompts = prompts
        self._seed = seed
        self._given_up: set[str] = set()  # prompt ids
        self._order = EpochOrder(seed=seed, stream=Stream.PROMPTS, size=len(prompts))
        self._first = 0
        self._end = 0
        self._open: dict[int, Demand] = {}  # queued or in flight
        self._queued: dict[int, None] = {}  # used as an ordered set
        self._finished: dict[int, Rollout] = {}
        self._first_missing = 0  # all ordinals in [first, first_missing) are finished
        self.duplicates = 0

    @property
    def first(self) -> int:
        """The next ordinal that a step will take."""
        return self._first

    @property
    def end(self) -> int:
        """The first ordinal that was never demanded."""
        return self._end

    @property
    def num_open(self) -> int:
        """Ordinals that are queued or in flight."""
        return len(self._open)

    @property
    def num_finished(self) -> int:
        """Ordinals that are finished and not drawn."""
        return len(self._finished)

    def open_until(self, end: int, *, min_version: int) -> None:
        """Demand all ordinals below `end` that were not demanded before.

        Their generation must start with weights of `min_version` or newer.
        """
        for ordinal, number in enumerate(self.prompts(self._end, end), self._end):
            self._open[ordinal] = _demand(self._prompts[number], ordinal, min_version)
            self._queued[ordinal] = None
        self._end = max(self._end, end)

    def prompts(self, start: int, stop: int) -> list[int]:
        """The numbers of the prompts of the ordinals `start` to `stop - 1`."""
        indices = self._order.indices(start, stop)
        return [
            self._unless_given_up(number, ordinal) for ordinal, number in enumerate(indices, start)
        ]

    def number_of(self, rollout: Rollout) -> int:
        """The number of a rollout's prompt, which may have been given up since."""
        assert rollout.ordinal is not None
        (number,) = self._order.indices(rollout.ordinal, rollout.ordinal + 1)
        return next(
            one
            for one in self._candidates(number, rollout.ordinal)
            if self._prompts[one].prompt_id == rollout.prompt_id
        )

    @property
    def given_up(self) -> tuple[str, ...]:
        """The ids of the prompts that were given up."""
        return tuple(sorted(self._given_up))

    def take(self) -> list[Demand]:
        """Return the queued ordinals, in order. They are in flight from now on."""
        for ordinal in self._queued:
            if self._open[ordinal].prompt_id in self._given_up:
                self._open[ordinal] = self._with_its_prompt(self._open[ordinal])
        taken = [self._open[ordinal] for ordinal in self._queued]
        self._queued.clear()
        return taken

    def finish(self, rollout: Rollout) -> None:
        """Store the rollout of an ordinal. A second rollout for it is ignored and counted."""
        assert rollout.ordinal is not None, f"{rollout.rollout_id} has no ordinal"
        demand = self._open.pop(rollout.ordinal, None)
        if demand is None:
            self.duplicates += 1
            return
        assert rollout.prompt_id == demand.prompt_id, (
            f"ordinal {rollout.ordinal} is for prompt {demand.prompt_id}, got {rollout.prompt_id}"
        )
        self._queued.pop(rollout.ordinal, None)
        self._finished[rollout.ordinal] = rollout
        self._skip_finished()

    def lose(self, ordinal: int) -> None:
        """Queue an ordinal again whose generation failed. Ignored unless it is in flight."""
        if ordinal not in self._open or ordinal in self._queued:
            return
        demand = self._open[ordinal]
        self._open[ordinal] = replace(demand, attempt=demand.attempt + 1)
        self._queued[ordinal] = None

    def give_up(self, ordinal: int, prompt_id: str) -> None:
        """Use a prompt no more, and queue an ordinal of it again. What is finished stays.

        Raises:
            DataError: every prompt is given up.
        """
        self._given_up.add(prompt_id)
        if len(self._given_up) >= len(self._prompts):
            raise DataError(
                f"data.train: generators fail at every one of its {len(self._prompts)} prompts; see"
                " the events `prompt given up` in metrics.jsonl, and the logs of their nodes"
            )
        self.lose(ordinal)

    def complete(self, count: int) -> bool:
        """Whether the next `count` ordinals are finished, without looking at each."""
        return self._first_missing >= self._first + count

    def missing(self, count: int) -> list[int]:
        """Those of the next `count` ordinals that are not finished, for a message."""
        ordinals = range(self._first, self._first + count)
        return [ordinal for ordinal in ordinals if ordinal not in self._finished]

    def draw(self, count: int) -> tuple[Rollout, ...]:
        """Take the next `count` ordinals, in order, whichever finished first."""
        stop = self._first + count
        assert stop <= self._end
        drawn = tuple(self._finished.pop(ordinal) for ordinal in range(self._first, stop))
        self._first = stop
        return drawn

    def outstanding(self) -> tuple[tuple[int, str, int, int], ...]:
        """(ordinal, prompt id, min_version, attempt) of what is queued or in flight.

        The prompt is the one of the next attempt.
        """
        return tuple(
            (ordinal, self._with_its_prompt(demand).prompt_id, demand.min_version, demand.attempt)
            for ordinal, demand in sorted(self._open.items())
        )

    def finished(self) -> tuple[Rollout, ...]:
        """The rollouts that are finished and not drawn, by ordinal."""
        return tuple(self._finished[ordinal] for ordinal in sorted(self._finished))

    def restore(
        self,
        *,
        first: int,
        end: int,
        finished: Iterable[Rollout],
        outstanding: Iterable[tuple[int, str, int, int]],
        given_up: Iterable[str],
    ) -> None:
        """Restore the ordinals [first, end) of a saved state; what was in flight is queued.

        Args:
            outstanding: as returned by `outstanding`.

        Raises:
            ValueError: an ordinal's prompt is not the saved one.
        """
        self._first = self._first_missing = first
        self._end = end
        self._given_up = set(given_up)
        self._open.clear()
        self._queued.clear()
        self._finished = {
            rollout.ordinal: rollout
            for rollout in finished
            if rollout.ordinal is not None and rollout.ordinal < end
        }
        self._skip_finished()
        for ordinal, prompt_id, min_version, attempt in outstanding:
            if ordinal >= end:
                continue
            (number,) = self.prompts(ordinal, ordinal + 1)
            prompt = self._prompts[number]
            if prompt.prompt_id != prompt_id:
                raise ValueError(
                    f"the prompts must be those of the saved buffer, got {prompt.prompt_id!r} for"
                    f" ordinal {ordinal} instead of {prompt_id!r}: the resumed run would train on"
                    " different prompts; restore the data files, or start a new run"
                )
            self._open[ordinal] = _demand(prompt, ordinal, min_version, attempt)
            self._queued[ordinal] = None

    def _unless_given_up(self, number: int, ordinal: int) -> int:
        """The prompt of this number, or the ordinal's substitute for it."""
        if not self._given_up:
            return number
        return next(
            one
            for one in self._candidates(number, ordinal)
            if self._prompts[one].prompt_id not in self._given_up
        )

    def _candidates(self, number: int, ordinal: int) -> Iterator[int]:
        """The prompt of an ordinal, and its substitutes in their order."""
        yield number
        yield from (
            generator(self._seed, Stream.SUBSTITUTES, ordinal)
            .permutation(len(self._prompts))
            .tolist()
        )

    def _with_its_prompt(self, demand: Demand) -> Demand:
        """The demand with the prompt that its ordinal has now."""
        (number,) = self.prompts(demand.ordinal, demand.ordinal + 1)
        prompt = self._prompts[number]
        return replace(demand, prompt_id=prompt.prompt_id, prompt_ids=prompt.token_ids)

    def _skip_finished(self) -> None:
        """Move past what is finished; over a run this looks at every ordinal once."""
        while self._first_missing in self._finished:
            self._first_missing += 1


def _demand(prompt: Prompt, ordinal: int, min_version: int, attempt: int = 0) -> Demand:
    return Demand(
        ordinal=ordinal,
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.token_ids,
        min_version=min_version,
        attempt=attempt,
    )
