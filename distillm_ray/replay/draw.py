"""The randomness of a draw: which slot takes what, as a function of seed, step and slot.

Nothing here keeps a random state, so a resumed run needs none: every number is computed from the
seed and a position. B slots of the global batch.
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
    """Independent uses of the one seed."""

    SLOTS = 0  # index: step
    REPLAY = 1  # index: step
    PROMPTS = 2  # index: epoch of the prompts for fresh rollouts
    DEMONSTRATIONS = 3  # index: epoch of the data-set responses


def generator(seed: int, stream: Stream, index: int) -> np.random.Generator:
    """The generator of one step or epoch."""
    entropy = np.random.SeedSequence((seed, int(stream), index))
    return np.random.Generator(np.random.Philox(entropy))


def slot_uniforms(seed: int, step: int, num_slots: int) -> Float64Array:
    """u ~ U(0, 1) of each slot; slot i's is the same whatever `num_slots` is."""
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
    """How many fresh rollouts each coming step takes, with `num_replay` on the replay shelf now.

    u < psi is fresh; while the shelf holds fewer than `min_size`, all of u < phi is. A promise
    never shrinks: a rise of phi fills the shelf earlier and may end the conversion of replay
    slots, but rollouts already demanded are still trained on, once and in time.
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
    """Each slot's shelf: the `num_fresh` smallest u are fresh, the next ones replay."""
    assert 0 <= num_fresh <= num_student <= len(uniforms_B)
    order_B = np.argsort(uniforms_B, kind="stable")
    shelves = [Shelf.DATASET] * len(uniforms_B)
    for rank, slot in enumerate(order_B[:num_student].tolist()):
        shelves[slot] = Shelf.FRESH if rank < num_fresh else Shelf.REPLAY
    return tuple(shelves)


class EpochOrder:
    """An endless walk over `size` items: position -> index, shuffled anew each epoch."""

    def __init__(self, *, seed: int, stream: Stream, size: int) -> None:
        """Epoch e is a permutation that depends on the seed, the stream and e only."""
        self._seed = seed
        self._stream = stream
        self._size = size
        self._epochs: dict[int, Int64Array] = {}

    def indices(self, start: int, stop: int) -> list[int]:
        """The indices at the positions `start` to `stop - 1`."""
        found: list[int] = []
        while start < stop:
            epoch, offset = divmod(start, self._size)
            taken = min(stop - start, self._size - offset)
            found.extend(self._epoch(epoch)[offset : offset + taken].tolist())
            start += taken
        return found

    def _epoch(self, epoch: int) -> Int64Array:
        if epoch not in self._epochs:
            # Two of them: a window of steps spans at most one border of a data set of some size.
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            rng = generator(self._seed, self._stream, epoch)
            self._epochs[epoch] = rng.permutation(self._size)
        return self._epochs[epoch]
