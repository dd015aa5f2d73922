"""Statistics of one optimizer step, summed over micro-batches and ranks in one all-reduce.

Axes: N loss positions, S sequences of a packed row, M terms of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distillm_ray.config import Term, has_curriculum
from distillm_ray.loss.curriculum import GapSum
from distillm_ray.loss.head_loss import HeadLoss
from distillm_ray.loss.terms import term_names
from distillm_ray.loss.token_health import TokenHealth
from distillm_ray.types import BoolArray, LearnerBatch, Shelf, TrainStep

_SHELVES = tuple(Shelf)
# Indices into the vector of sums. The sums of the terms follow at the end, and after them three
# for each term with a curriculum: of gaps, of alphas, and the number of sequences.
_LOSS, _INFINITE, _GAP, _GAP_TOKENS = range(4)
_HEALTH = 4  # the fields of TokenHealth
_SHELF_LOSS = _HEALTH + len(TokenHealth._fields)
_SHELF_FINITE = _SHELF_LOSS + len(_SHELVES)
_TERM_LOSS = _SHELF_FINITE + len(_SHELVES)


def counted_tokens(batch: LearnerBatch) -> BoolArray:
    """`[N]`, False for the loss positions of fillers."""
    return ~np.array(batch.is_filler)[batch.sequence_index_N]


class StepStatistics:
    """Accumulates on the device, so that nothing synchronizes with it before `reduce`."""

    def __init__(
        self, terms: Sequence[Term], device: torch.device, *, compare_engine: bool = True
    ) -> None:
        """`compare_engine`: the engine's log-probabilities should be the student's."""
        self._terms = terms
        self._compare_engine = compare_engine
        self._curricula = [index for index, term in enumerate(terms) if has_curriculum(term)]
        self._gaps = _TERM_LOSS + len(terms)
        size = self._gaps + 3 * len(self._curricula)
        self._sums = torch.zeros(size, dtype=torch.float64, device=device)
        self._gap_sums: tuple[GapSum, ...] | None = None
        self._positions = 0
        self._tokens = 0
        self._loss_tokens = 0

    def add(self, batch: LearnerBatch, result: HeadLoss) -> None:
        """Add one micro-batch."""
        sums = self._sums
        counts_N = counted_tokens(batch)
        self._positions += len(batch.token_ids_L)
        self._tokens += int(np.diff(batch.boundaries)[~np.array(batch.is_filler)].sum())
        self._loss_tokens += int(counts_N.sum())
        sums[_LOSS] += result.loss.detach().double()
        sums[_INFINITE] += result.num_infinite
        sums[_TERM_LOSS : self._gaps] += result.losses_M.double()
        for place, term in enumerate(self._curricula):
            start = self._gaps + 3 * place
            sums[start : start + 3] += self._gaps_in(batch, result, term)
        shelf_S = np.array([_SHELVES.index(shelf) for shelf in batch.shelves])
        shelf_N = torch.from_numpy(shelf_S[batch.sequence_index_N]).to(sums.device)
        losses_N = self._token_losses(batch, result)
        finite_N = losses_N.isfinite() & torch.from_numpy(counts_N).to(sums.device)
        losses_N = losses_N.double().masked_fill(~finite_N, 0.0)
        sums[_SHELF_LOSS:_SHELF_FINITE].index_add_(0, shelf_N, losses_N)
        sums[_SHELF_FINITE:_TERM_LOSS].index_add_(0, shelf_N, finite_N.double())
        if result.health is not None:
            health = [torch.as_tensor(value, device=sums.device) for value in result.health]
            sums[_HEALTH:_SHELF_LOSS] += torch.stack([value.double() for value in health])
        if (
            self._compare_engine
            and batch.behaviour_logprobs_N is not None
            and result.log_probs_N is not None
        ):
            # Only samples of the current weights: others differ because the weights do.
            current_S = np.array([age == 0 for age in batch.ages])
            behaviour_N = np.where(
                current_S[batch.sequence_index_N], batch.behaviour_logprobs_N, np.nan
            )
            gaps_N = (result.log_probs_N - torch.from_numpy(behaviour_N).to(sums.device)).abs()
            sums[_GAP] += gaps_N.masked_fill(~gaps_N.isfinite(), 0.0).double().sum()
            sums[_GAP_TOKENS] += gaps_N.isfinite().sum()

    def _gaps_in(self, batch: LearnerBatch, result: HeadLoss, term: int) -> Tensor:
        """`[3]`: gaps, alphas and number of the sequences that a term with a curriculum covers."""
        alphas = result.alphas[term]
        if alphas is None:  # a row without targets, of which the term covers no token
            return self._sums.new_zeros(3)
        # Each sequence once, at its first loss position.
        first_N = np.diff(batch.sequence_index_N, prepend=-1) != 0
        wanted_N = first_N & counted_tokens(batch) & (batch.term_weights_N[term] != 0)
        known_N = torch.from_numpy(wanted_N).to(self._sums.device) & alphas.gaps_N.isfinite()
        return torch.stack(
            [
                alphas.gaps_N.where(known_N, 0.0).double().sum(),
                alphas.alphas_N.where(known_N, 0.0).double().sum(),
                known_N.double().sum(),
            ]
        )

    @property
    def gaps(self) -> tuple[GapSum, ...]:
        """Of each term, over all ranks; zeros without a curriculum. Known after `reduce`."""
        assert self._gap_sums is not None, "reduce comes first"
        return self._gap_sums

    def _token_losses(self, batch: LearnerBatch, result: HeadLoss) -> Tensor:
        """`[N]`, each token's sum over the terms that cover it of the term's weight x value."""
        total_N = torch.zeros_like(result.values[0])
        for term, weights_N, values_N in zip(
            self._terms, batch.term_weights_N, result.values, strict=True
        ):
            covered_N = torch.from_numpy(weights_N != 0).to(total_N.device)
            total_N = total_N + term.weight * values_N.where(covered_N, 0.0)
        return total_N

    def reduce(self, step: int, *, wait_seconds: float) -> TrainStep:
        """Sum over ranks, a collective where there are ranks; `wait_seconds` are this rank's.

        The caller adds learning rate, gradient norm, seconds and whether the step was skipped.
        """
        grouped = dist.is_initialized()
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        by_rank = torch.zeros(4, num_ranks, dtype=torch.float64, device=self._sums.device)
        by_rank[:, rank] = torch.tensor(
            [self._positions, self._tokens, self._loss_tokens, wait_seconds],
            dtype=torch.float64,
        )
        everything = torch.cat([by_rank.flatten(), self._sums])
        if grouped:
            dist.all_reduce(everything)
        positions, tokens, loss_tokens, waits = (
            everything[: by_rank.numel()].view_as(by_rank).tolist()
        )
        flat = everything[by_rank.numel() :].tolist()
        gap_sums = [GapSum()] * len(self._terms)
        for place, term in enumerate(self._curricula):
            gaps, alphas, number = flat[self._gaps + 3 * place :][:3]
            gap_sums[term] = GapSum(gaps=gaps, alphas=alphas, num_sequences=int(number))
        self._gap_sums = tuple(gap_sums)
        names = term_names(self._terms)
        num_sampled, *health = flat[_HEALTH:_SHELF_LOSS]
        entropy, teacher_entropy, overlap, probability = (
            value / num_sampled if num_sampled else math.nan for value in health
        )
        return TrainStep(
            step=step,
            loss=flat[_LOSS],
            loss_by_shelf={
                shelf.value: flat[_SHELF_LOSS + index] / flat[_SHELF_FINITE + index]
                for index, shelf in enumerate(_SHELVES)
                if flat[_SHELF_FINITE + index] > 0
            },
            loss_by_term={
                name: total / term.weight
                for name, term, total in zip(
                    names, self._terms, flat[_TERM_LOSS : self._gaps], strict=True
                )
            },
            alpha_by_term={
                name: sums.alphas / sums.num_sequences
                for name, sums in zip(names, gap_sums, strict=True)
                if sums.num_sequences > 0
            },
            infinite_tokens=int(flat[_INFINITE]),
            logprob_gap=flat[_GAP] / flat[_GAP_TOKENS] if flat[_GAP_TOKENS] > 0 else math.nan,
            student_entropy=entropy,
            teacher_entropy=teacher_entropy,
            top_overlap=overlap,
            teacher_probability=probability,
            positions=int(sum(positions)),
            tokens=int(sum(tokens)),
            loss_tokens=int(sum(loss_tokens)),
            wait_seconds=max(waits),
            rank_token_imbalance=(max(positions) - min(positions)) / max(positions),
        )
