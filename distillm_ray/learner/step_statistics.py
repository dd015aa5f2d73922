"""What one optimizer step looked like, summed over micro-batches and ranks in one all-reduce.

Axes: N loss positions, S sequences of a packed row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distillm_ray.loss.head_loss import HeadLoss
from distillm_ray.types import LearnerBatch, Shelf

_SHELVES = tuple(Shelf)
_LOSS, _INFINITE, _GAP, _GAP_TOKENS = range(4)
_SHELF_LOSS = 4
_SHELF_FINITE = _SHELF_LOSS + len(_SHELVES)
_NUM_SUMS = _SHELF_FINITE + len(_SHELVES)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Over the global batch."""

    loss: float  # weighted sum
    loss_by_shelf: dict[str, float]  # token means, infinite tokens left out
    infinite_tokens: int
    logprob_gap: float  # mean |engine - learner| over tokens of age 0; NaN without any
    positions: int  # tokens computed, fillers included
    tokens: int
    loss_tokens: int
    wait_seconds: float  # of the slowest rank
    rank_token_imbalance: float


class StepStatistics:
    """Accumulates on the device, so that nothing waits for it before `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=device)
        self._positions = 0
        self._tokens = 0
        self._loss_tokens = 0

    def add(self, batch: LearnerBatch, answer: HeadLoss, token_losses_N: Tensor) -> None:
        """One micro-batch; `token_losses_N` is each token's loss without its weight."""
        sums = self._sums
        # A filler, whose tokens weigh nothing, is computed but no part of the batch.
        counts_N = batch.token_weights_N > 0
        counts_S = np.bincount(batch.sequence_index_N, counts_N, len(batch.shelves)) > 0
        self._positions += len(batch.token_ids_L)
        self._tokens += int(np.diff(batch.boundaries)[counts_S].sum())
        self._loss_tokens += int(counts_N.sum())
        sums[_LOSS] += answer.loss.detach().double()
        sums[_INFINITE] += answer.num_infinite
        shelf_S = np.array([_SHELVES.index(shelf) for shelf in batch.shelves])
        shelf_N = torch.from_numpy(shelf_S[batch.sequence_index_N]).to(sums.device)
        finite_N = token_losses_N.isfinite() & torch.from_numpy(counts_N).to(sums.device)
        losses_N = token_losses_N.double().masked_fill(~finite_N, 0.0)
        sums[_SHELF_LOSS:_SHELF_FINITE].index_add_(0, shelf_N, losses_N)
        sums[_SHELF_FINITE:].index_add_(0, shelf_N, finite_N.double())
        if batch.behaviour_logprobs_N is not None and answer.log_probs_N is not None:
            # Only samples of this very version: older ones differ because the weights do.
            current_S = np.array([age == 0 for age in batch.ages])
            behaviour_N = np.where(
                current_S[batch.sequence_index_N], batch.behaviour_logprobs_N, np.nan
            )
            gaps_N = (answer.log_probs_N - torch.from_numpy(behaviour_N).to(sums.device)).abs()
            sums[_GAP] += gaps_N.masked_fill(~gaps_N.isfinite(), 0.0).double().sum()
            sums[_GAP_TOKENS] += gaps_N.isfinite().sum()

    def reduce(self, wait_seconds: float) -> StepTotals:
        """Sum over ranks; a collective."""
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        by_rank = torch.zeros(4, num_ranks, dtype=torch.float64, device=self._sums.device)
        by_rank[:, rank] = torch.tensor(
            [self._positions, self._tokens, self._loss_tokens, wait_seconds],
            dtype=torch.float64,
        )
        everything = torch.cat([self._sums, by_rank.flatten()])
        dist.all_reduce(everything)
        flat = everything.tolist()
        positions, tokens, loss_tokens, waits = (
            flat[_NUM_SUMS + index * num_ranks : _NUM_SUMS + (index + 1) * num_ranks]
            for index in range(4)
        )
        return StepTotals(
            loss=flat[_LOSS],
            loss_by_shelf={
                shelf.value: flat[_SHELF_LOSS + index] / flat[_SHELF_FINITE + index]
                for index, shelf in enumerate(_SHELVES)
                if flat[_SHELF_FINITE + index] > 0
            },
            infinite_tokens=int(flat[_INFINITE]),
            logprob_gap=flat[_GAP] / flat[_GAP_TOKENS] if flat[_GAP_TOKENS] > 0 else math.nan,
            positions=int(sum(positions)),
            tokens=int(sum(tokens)),
            loss_tokens=int(sum(loss_tokens)),
            wait_seconds=max(waits),
            rank_token_imbalance=(max(positions) - min(positions)) / max(positions),
        )
