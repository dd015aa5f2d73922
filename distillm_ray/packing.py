"""Splits whole sequences over ranks and micro-batches, by their lengths alone.

Minimizes the number of micro-batches first and the ranks' token imbalance second. Deterministic. A
bin is one micro-batch.

Axes: G sequences of the rank that gives, R sequences of the rank that receives.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Bin: TypeAlias = list[int]  # indices of sequences


def split(
    lengths: Sequence[int], *, num_ranks: int, max_tokens: int
) -> tuple[tuple[Bin, ...], ...]:
    """Sequence indices by rank and bin; every rank has as many bins, each of at most `max_tokens`.

    A rank's bins are sorted by tokens, largest first, so that the ranks compute similar bins at the
    same time and memory peaks in the first one. If there are fewer sequences than bins, as with
    three full rows on two ranks, the remaining bins are empty.

    Example:
        >>> split([4, 3, 3, 2], num_ranks=2, max_tokens=6)
        (([0, 3],), ([1, 2],))

    Raises:
        ValueError: there is no sequence, or one is longer than `max_tokens`.
    """
    if not lengths:
        raise ValueError("there must be at least one sequence to split over ranks, got none")
    if max(lengths) > max_tokens:
        raise ValueError(
            f"learner.max_micro_batch_tokens must hold the longest sequence, got {max_tokens} <"
            f" {max(lengths)}: sequences are never cut"
        )
    # Longest first; ties keep their order.
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    packed = _best_fit(lengths, order, max_tokens)
    most = -(-len(packed) // num_ranks)
    fewest = -(-sum(lengths) // (num_ranks * max_tokens))
    for per_rank in range(fewest, most + 1):
        bins = _even_fit(lengths, order, max_tokens, per_rank * num_ranks)
        if bins is not None:
            break
    else:
        bins = _fill_empty_bins(lengths, packed, most * num_ranks)
        per_rank = most
    ranks = _group(lengths, bins, num_ranks, per_rank)
    _balance(lengths, ranks, max_tokens)
    for rank in ranks:
        for one in rank:
            one.sort()
        rank.sort(key=lambda one: (-_load(lengths, one), one))
    return tuple(tuple(rank) for rank in ranks)


def _load(lengths: Sequence[int], one: Bin) -> int:
    return sum(lengths[index] for index in one)


def _even_fit(
    lengths: Sequence[int], order: Sequence[int], max_tokens: int, num_bins: int
) -> list[Bin] | None:
    """Each sequence of `order` into the emptiest bin; None if one does not fit."""
    bins: list[Bin] = [[] for _ in range(num_bins)]
    heap = [(0, number) for number in range(num_bins)]
    for index in order:
        load, number = heap[0]
        load += lengths[index]
        if load > max_tokens:
            return None
        bins[number].append(index)
        heapq.heapreplace(heap, (load, number))
    return bins


def _best_fit(lengths: Sequence[int], order: Sequence[int], max_tokens: int) -> list[Bin]:
    """Each sequence of `order` into the fullest bin with room: few bins of unequal size."""
    bins: list[Bin] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in order:
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            bins.append([index])
            insort(room, (max_tokens - lengths[index], len(bins) - 1))
        else:
            free, number = room.pop(place)
            bins[number].append(index)
            insort(room, (free - lengths[index], number))
    return bins


def _fill_empty_bins(lengths: Sequence[int], bins: list[Bin], num_bins: int) -> list[Bin]:
    """Extend to `num_bins`: each new bin takes a sequence from the fullest bin that has several."""
    while len(bins) < num_bins:
        spare = [one for one in bins if len(one) > 1]
        if not spare:
            bins.append([])
            continue
        fullest = max(spare, key=lambda one: _load(lengths, one))
        bins.append([fullest.pop(0)])
    return bins


def _group(
    lengths: Sequence[int], bins: Sequence[Bin], num_ranks: int, per_rank: int
) -> list[list[Bin]]:
    """Assign bins, largest first, each to the rank with the fewest tokens and room for a bin."""
    ranks: list[list[Bin]] = [[] for _ in range(num_ranks)]
    heap = [(0, rank) for rank in range(num_ranks)]
    for one in sorted(bins, key=lambda one: -_load(lengths, one)):
        load, rank = heapq.heappop(heap)
        ranks[rank].append(one)
        if len(ranks[rank]) < per_rank:
            heapq.heappush(heap, (load + _load(lengths, one), rank))
    return ranks


def _balance(lengths: Sequence[int], ranks: list[list[Bin]], max_tokens: int) -> None:
    """Move or swap sequences between ranks, in place, while that reduces the imbalance."""
    loads = [sum(_load(lengths, one) for one in rank) for rank in ranks]
    for _ in range(8 * len(ranks)):
        by_load = sorted(range(len(ranks)), key=lambda rank: loads[rank])
        low, high = by_load[0], by_load[-1]
        # An imbalance below one percent costs nothing; stopping here keeps large batches cheap.
        if (loads[high] - loads[low]) * 100 <= loads[high]:
            return
        moved = next(
            (
                (giver, taker, tokens)
                for giver, taker in [
                    (high, low),
                    *((high, rank) for rank in by_load[1:-1]),
                    *((rank, low) for rank in reversed(by_load[1:-1])),
                ]
                if (tokens := _exchange(lengths, ranks, loads, giver, taker, max_tokens)) > 0
            ),
            None,
        )
        if moved is None:
            return
        giver, taker, tokens = moved
        loads[giver] -= tokens
        loads[taker] += tokens


def _exchange(
    lengths: Sequence[int],
    ranks: list[list[Bin]],
    loads: Sequence[int],
    giver: int,
    taker: int,
    max_tokens: int,
) -> int:
    """Make the best move or swap between two ranks; returns the tokens moved, 0 if none helps."""
    gap = loads[giver] - loads[taker]
    if gap < 2:
        return 0
    given = [(index, one) for one in ranks[giver] for index in one]
    # None: a move, which takes nothing back.
    returned = [(index, one) for one in ranks[taker] for index in one]
    returned_or_none = [*returned, *((None, one) for one in ranks[taker])]
    given_G = np.array([lengths[index] for index, _ in given])
    returned_R = np.array([0 if index is None else lengths[index] for index, _ in returned_or_none])
    free_R = np.array([max_tokens - _load(lengths, one) for _, one in returned_or_none])
    movable_G = np.array([len(one) > 1 for _, one in given])
    swap_R = np.array([index is not None for index, _ in returned_or_none])

    tokens_GR = given_G[:, None] - returned_R[None, :]
    allowed_GR = (tokens_GR > 0) & (tokens_GR < gap) & (tokens_GR <= free_R[None, :])
    allowed_GR &= movable_G[:, None] | swap_R[None, :]
    if not allowed_GR.any():
        return 0
    cost_GR = np.where(allowed_GR, np.abs(2 * tokens_GR - gap), np.iinfo(np.int64).max)
    g, r = divmod(int(cost_GR.argmin()), cost_GR.shape[1])
    (index, source), (back, target) = given[g], returned_or_none[r]
    source.remove(index)
    target.append(index)
    if back is not None:
        target.remove(back)
        source.append(back)
    return int(tokens_GR[g, r])
