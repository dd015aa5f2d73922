"""The randomness of a draw: which shelf each slot takes, as a function of seed, step and slot.

No random state is kept: every number is computed from the seed and a position, so a checkpoint
stores none. Axes: B slots of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from distillm_ray.replay.schedule import Schedule
from distillm_ray.types import Shelf

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]


class Stream(IntEnum):
    """Independent random streams of one seed."""

    SLOTS = 0  # index: step
    REPLAY = 1  # index: step
    PROMPTS = 2  # index: epoch over the prompts of fresh rollouts
    DEMONSTRATIONS = 3  # index: epoch over the data-set responses
    CORPUS = 4  # index: epoch over the pieces of the corpus
    SUBSTITUTES = 5  # index: ordinal whose prompt was given up


def generator(seed: int, stream: Stream, index: int) -> np.random.Generator:
    """The random generator of one step or epoch."""
    entropy = np.random.SeedSequence((seed, int(stream), index))
    return np.random.Generator(np.random.Philox(entropy))


def slot_uniforms(seed: int, step: int, num_slots: int) -> Float64Array:
    """u ~ U(0, 1) for each slot `[B]`. The value of slot i does not depend on `num_slots`."""
    return generator(seed, Stream.SLOTS, step).random(num_slots)


def promise_fresh(
    steps: range,
    promised: Mapping[int, int],
    schedule: Schedule,
    *,
    seed: int,
    batch_size: int,
    num_replay: int,
    min_size: int,
    capacity: int,
) -> dict[int, int]:
    """How many fresh rollouts each coming step takes, by step.

    A slot with u < psi is fresh. While the replay shelf holds fewer than `min_size` sequences,
    slots with psi <= u < phi are converted from replay to fresh. A promise never shrinks: when a
    rise of phi fills the shelf earlier and ends the conversion, rollouts that were demanded for it
    are still trained on, once and in time.

    Args:
        promised: the counts promised so far; a missing step has 0.
        num_replay: sequences on the replay shelf before the first of `steps`.
        capacity: of the replay shelf.
    """
    counts: dict[int, int] = {}
    for step in steps:
        uniforms_B = slot_uniforms(seed, step, batch_size)
        rate = schedule.phi if num_replay < min_size else schedule.rollout_rate(step)
        counts[step] = max(int(np.count_nonzero(uniforms_B < rate)), promised.get(step, 0))
        num_replay = min(num_replay + counts[step], capacity)
    return counts


def assign_shelves(
    uniforms_B: Float64Array, *, num_fresh: int, num_student: int
) -> tuple[Shelf, ...]:
    """The shelf of each slot `[B]`: fresh for the smallest u, then replay, then the data set.

    Example:
        >>> shelves = assign_shelves(np.array([0.9, 0.1, 0.4]), num_fresh=1, num_student=2)
        >>> [str(shelf) for shelf in shelves]
        ['dataset', 'fresh', 'replay']
    """
    assert 0 <= num_fresh <= num_student <= len(uniforms_B)
    order_B = np.argsort(uniforms_B, kind="stable")
    shelves = [Shelf.DATASET] * len(uniforms_B)
    for rank, slot in enumerate(order_B[:num_student].tolist()):
        shelves[slot] = Shelf.FRESH if rank < num_fresh else Shelf.REPLAY
    return tuple(shelves)


class EpochOrder:
    """Endless order over `size` items, shuffled again for each epoch.

    Example:
        >>> order = EpochOrder(seed=0, stream=Stream.PROMPTS, size=3)
        >>> sorted(order.indices(0, 3)), sorted(order.indices(3, 6))
        ([0, 1, 2], [0, 1, 2])
    """

    def __init__(self, *, seed: int, stream: Stream, size: int) -> None:
        """The permutation of an epoch depends only on seed, stream and epoch."""
        self._seed = seed
        self._stream = stream
        self._size = size
        self._epochs: dict[int, Int64Array] = {}

    def indices(self, start: int, stop: int) -> list[int]:
        """The items at positions `start` to `stop - 1`."""
        found: list[int] = []
        while start < stop:
            epoch, offset = divmod(start, self._size)
            taken = min(stop - start, self._size - offset)
            found.extend(self._epoch(epoch)[offset : offset + taken].tolist())
            start += taken
        return found

    def _epoch(self, epoch: int) -> Int64Array:
        if epoch not in self._epochs:
            # Two are cached: a window of steps usually crosses at most one epoch boundary.
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            rng = generator(self._seed, self._stream, epoch)
            self._epochs[epoch] = rng.permutation(self._size)
        return self._epochs[epoch]
