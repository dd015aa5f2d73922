"""The shelves: data-set responses, fresh rollouts, replayed rollouts, and the corpus beside them.

draw.py decides which shelf each slot takes from; this module takes the sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distillm_ray.replay.demand import Ordinals
from distillm_ray.replay.draw import EpochOrder, Stream, assign_shelves, generator, slot_uniforms
from distillm_ray.types import DrawnSequence, Prompt, Rollout, Shelf


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Position:
    """A snapshot of the shelves. Cheap: it shares the sequences."""

    first_ordinal: int
    dataset_position: int
    replay: tuple[Rollout, ...]  # oldest first


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """The sequences that a step took, and the shelves before it."""

    sequences: tuple[DrawnSequence, ...]  # in slot order, then the corpus
    fresh: tuple[Rollout, ...]
    before: Position


class Shelves:
    """Fresh rollouts by ordinal, the replay shelf, and endless walks over data set and corpus."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Rollout],
        *,
        paired: bool = False,
        corpus: Sequence[Rollout] = (),
        corpus_batch: int = 0,
        batch_size: int,
        capacity: int,
        seed: int,
    ) -> None:
        """`capacity` limits the replay shelf, which drops its oldest sequence first.

        With `paired`, each fresh rollout is taken together with the demonstration of its prompt,
        which has the same number. Every step also takes `corpus_batch` sequences of the corpus.
        Which ones depends on seed and step alone, so no position of the corpus is saved.
        """
        self.ordinals = Ordinals(prompts, seed=seed)
        self._demonstrations = demonstrations
        self._order = EpochOrder(seed=seed, stream=Stream.DEMONSTRATIONS, size=len(demonstrations))
        self._replay: deque[Rollout] = deque(maxlen=capacity)
        self._dataset_position = 0
        self._announced = 0
        self._batch_size = batch_size
        self._seed = seed
        self._corpus = corpus
        self._corpus_batch = corpus_batch
        self._corpus_order = EpochOrder(seed=seed, stream=Stream.CORPUS, size=len(corpus))
        self._paired = paired

    @property
    def num_replay(self) -> int:
        """Sequences on the replay shelf."""
        return len(self._replay)

    @property
    def position(self) -> Position:
        """A snapshot of the shelves."""
        return Position(
            first_ordinal=self.ordinals.first,
            dataset_position=self._dataset_position,
            replay=tuple(self._replay),
        )

    def announce(self, num_slots: int) -> list[Rollout]:
        """Those of the next `num_slots` data-set sequences that were not returned before."""
        start = max(self._announced, self._dataset_position)
        self._announced = max(start, self._dataset_position + num_slots)
        return self._dataset(start, self._announced)

    def announce_pairs(self) -> list[Rollout]:
        """The demonstrations of all demanded ordinals that were not returned before."""
        start = max(self._announced, self.ordinals.first)
        self._announced = max(start, self.ordinals.end)
        numbers = self.ordinals.prompts(start, self._announced)
        return [self._demonstrations[number] for number in numbers]

    def corpus_of(self, step: int) -> list[Rollout]:
        """The sequences that the corpus adds to the batch of a step."""
        start = step * self._corpus_batch
        indices = self._corpus_order.indices(start, start + self._corpus_batch)
        return [self._corpus[index] for index in indices]

    def take(self, step: int, *, num_fresh: int, num_student: int) -> Taken:
        """Fill the batch of a step. Its fresh rollouts then move to the replay shelf."""
        before = self.position
        num_replay = num_student - num_fresh
        num_dataset = self._batch_size - num_student
        rng = generator(self._seed, Stream.REPLAY, step)
        chosen = rng.choice(len(before.replay), size=num_replay, replace=False).tolist()
        fresh = self.ordinals.draw(num_fresh)
        start = self._dataset_position
        supply = {
            Shelf.FRESH: iter(fresh),
            Shelf.REPLAY: iter([before.replay[index] for index in chosen]),
            Shelf.DATASET: iter(self._dataset(start, start + num_dataset)),
        }
        self._replay.extend(fresh)
        self._dataset_position += num_dataset
        corpus = tuple(_drawn(one, Shelf.CORPUS, step) for one in self.corpus_of(step))
        if self._paired:
            assert num_replay == num_dataset == 0, "pairs have no other slots"
            pairs = [(self._demonstrations[self.ordinals.number_of(one)], one) for one in fresh]
            assert all(learned.prompt_id == one.prompt_id for learned, one in pairs)
            return Taken(
                sequences=(
                    *(
                        _drawn(one, shelf, step)
                        for pair in pairs
                        for one, shelf in zip(pair, (Shelf.DATASET, Shelf.FRESH), strict=True)
                    ),
                    *corpus,
                ),
                fresh=fresh,
                before=before,
            )
        slots = assign_shelves(
            slot_uniforms(self._seed, step, self._batch_size),
            num_fresh=num_fresh,
            num_student=num_student,
        )
        return Taken(
            sequences=(*(_drawn(next(supply[shelf]), shelf, step) for shelf in slots), *corpus),
            fresh=fresh,
            before=before,
        )

    def restore(self, *, dataset_position: int, replay: Iterable[Rollout]) -> None:
        """Restore a saved position; the ordinals are restored on their own."""
        self._replay = deque(replay, maxlen=self._replay.maxlen)
        self._dataset_position = dataset_position
        # Of pairs, the ordinals that were announced before are announced once more.
        self._announced = 0 if self._paired else dataset_position

    def _dataset(self, start: int, stop: int) -> list[Rollout]:
        return [self._demonstrations[index] for index in self._order.indices(start, stop)]


def _drawn(rollout: Rollout, shelf: Shelf, step: int) -> DrawnSequence:
    is_data = shelf in (Shelf.DATASET, Shelf.CORPUS)
    age = 0 if is_data else step - rollout.version
    return DrawnSequence(rollout=rollout, shelf=shelf, age=age)
