"""DistiLLM-2's curriculum: an alpha for each sequence (Ko et al., ICML 2025).

The gap of a sequence y is the difference of two probabilities a token, geometric means over the
loss tokens of y at temperature 1, p teacher and q student:

    skew_kl              gap = exp(mean log p(y)) - exp(mean log q(y))
    skew_reverse_kl      gap = exp(mean log q(y)) - exp(mean log p(y))

The anchor is the mean gap over the sequences of a term's first steps, and a constant afterwards.
With alpha0 the term's `alpha`, the sequence's alpha is

    1 - (1 - alpha0) anchor / (gap + 1e-5)      clipped to min_alpha ... alpha0

A gap of the anchor's size or more keeps alpha0, a smaller one lowers alpha, and a negative one (the
other model is the more certain) keeps alpha0 again. alpha0 also holds while there is no anchor,
under an anchor that is not positive, and where a label is impossible for one of the models. No
gradient flows through alpha.

Axes: N loss positions of a packed row, in which every sequence lies whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from distillm_ray.config import SkewKL, SkewReverseKL, Term, has_curriculum

GAP_OFFSET = 1e-5
"""Added to a gap before it divides, as in the released code of DistiLLM-2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GapSum:
    """Sums over the sequences of one step that a term covers and whose gap is known."""

    gaps: float = 0.0
    alphas: float = 0.0
    num_sequences: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """The gaps of a term so far, up to the end of its window.

    The window is the first `anchor_steps` steps in which the term has a sequence.

    Example:
        >>> term = SkewKL(curriculum=True, anchor_steps=2)
        >>> one = Anchor().plus(GapSum(gaps=0.5, num_sequences=2), term)
        >>> one.gap(term) is None
        True
        >>> two = one.plus(GapSum(), term).plus(GapSum(gaps=0.1, num_sequences=1), term)
        >>> round(two.gap(term), 4)
        0.2
        >>> two.plus(GapSum(gaps=9.0, num_sequences=1), term) == two
        True
    """

    gaps: float = 0.0  # their sum
    num_sequences: int = 0
    num_steps: int = 0

    def plus(self, step: GapSum, term: SkewKL | SkewReverseKL) -> Anchor:
        """The anchor after one more step."""
        if self.num_steps == term.anchor_steps or step.num_sequences == 0:
            return self
        return Anchor(
            gaps=self.gaps + step.gaps,
            num_sequences=self.num_sequences + step.num_sequences,
            num_steps=self.num_steps + 1,
        )

    def gap(self, term: SkewKL | SkewReverseKL) -> float | None:
        """The mean gap of the window; None before its end."""
        if self.num_steps < term.anchor_steps:
            return None
        return self.gaps / self.num_sequences


Anchors: TypeAlias = tuple[Anchor, ...]
"""One for each term of the loss; those of terms without a curriculum stay empty."""


def first_anchors(terms: Sequence[Term]) -> Anchors:
    """The anchors before the first step."""
    return (Anchor(),) * len(terms)


def next_anchors(anchors: Anchors, terms: Sequence[Term], step: Sequence[GapSum]) -> Anchors:
    """The anchors after one more step."""
    return tuple(
        anchor.plus(gaps, term) if has_curriculum(term) else anchor
        for anchor, term, gaps in zip(anchors, terms, step, strict=True)
    )


def anchor_gaps(anchors: Anchors, terms: Sequence[Term]) -> tuple[float | None, ...]:
    """For each term the gap that it compares with, where it has a curriculum and knows it."""
    return tuple(
        anchor.gap(term) if has_curriculum(term) else None
        for anchor, term in zip(anchors, terms, strict=True)
    )


class SequenceAlphas(NamedTuple):
    """The gap and alpha of each token's sequence, `[N]` each. An unknown gap is NaN."""

    gaps_N: Tensor
    alphas_N: Tensor


def sequence_alphas(
    term: SkewKL | SkewReverseKL,
    anchor: float | None,
    *,
    log_p_N: Tensor,
    log_q_N: Tensor,
    sequence_N: Tensor,
) -> SequenceAlphas:
    """Gap and alpha of every sequence of a row, in the dtype of `log_q_N`.

    Args:
        anchor: the term's `Anchor.gap`.
        log_p_N: the teacher's log-probability of each label.
        log_q_N: the student's.
        sequence_N: int64, which sequence a token belongs to.

    Example:
        The teacher has 0.8 and 0.5 a token, the student 0.3.

        >>> found = sequence_alphas(
        ...     SkewKL(alpha=0.1, curriculum=True), 0.21,
        ...     log_p_N=torch.tensor([0.8, 0.5]).log(), log_q_N=torch.tensor([0.3, 0.3]).log(),
        ...     sequence_N=torch.tensor([0, 1]),
        ... )
        >>> [round(gap, 4) for gap in found.gaps_N.tolist()]
        [0.5, 0.2]
        >>> [round(alpha, 4) for alpha in found.alphas_N.tolist()]
        [0.1, 0.055]
    """
    p_N, q_N = _mean_probabilities(log_p_N, sequence_N), _mean_probabilities(log_q_N, sequence_N)
    gaps_N = p_N - q_N if isinstance(term, SkewKL) else q_N - p_N
    alphas_N = torch.full_like(gaps_N, term.alpha)
    if anchor is not None and anchor > 0:
        lowered_N = 1 - (1 - term.alpha) * anchor / (gaps_N + GAP_OFFSET)
        lowered_N = lowered_N.clamp(term.min_alpha, term.alpha)
        alphas_N = torch.where(gaps_N.isfinite(), lowered_N, alphas_N)
    return SequenceAlphas(gaps_N.to(log_q_N.dtype), alphas_N.to(log_q_N.dtype))


def _mean_probabilities(log_probs_N: Tensor, sequence_N: Tensor) -> Tensor:
    """`[N]`, float64: of each token's sequence; NaN where a token is impossible."""
    log_probs_N = log_probs_N.double()
    if not len(log_probs_N):
        return log_probs_N
    sums_S = log_probs_N.new_zeros(int(sequence_N.max()) + 1)
    counts_S = torch.zeros_like(sums_S)
    sums_S.index_add_(0, sequence_N, log_probs_N)
    counts_S.index_add_(0, sequence_N, torch.ones_like(log_probs_N))
    means_N = (sums_S / counts_S)[sequence_N]
    return means_N.exp().masked_fill(~means_N.isfinite(), torch.nan)
