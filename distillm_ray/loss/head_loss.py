"""What is asked of the output head about a micro-batch, what it answers, and the plain answer.

`plain_loss` materialises all logits and leaves the gradient to autograd: the reference for
`fused.fused_loss`, which has the same signature and is what training uses.

Axes: N loss positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distillm_ray import config
from distillm_ray.loss.divergences import (
    FLOOR,
    define,
    divergence_of_log_probabilities,
    log_probabilities,
)
from distillm_ray.loss.teacher_tensors import (
    TeacherHidden,
    TeacherLogits,
    TeacherTensors,
    TeacherTopK,
    student_buckets,
    teacher_buckets,
)
from distillm_ray.models.heads import finish_logits
from distillm_ray.models.logit_rules import LogitRule


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DivergenceTerm:
    """One divergence from the teacher, with the weight of each token's value in the loss."""

    divergence: config.Divergence
    weights_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossRequest:
    """What to compute at N loss positions; every part may be left out.

    The loss is the sum over tokens of: each term's weight times its divergence, plus
    `cross_entropy_weights_N` times -log q(label). Tensors are on the device of the hidden states.
    """

    terms: tuple[DivergenceTerm, ...] = ()
    teacher: TeacherTensors | None = None  # needed where there are terms
    labels_N: Tensor | None = None  # int64
    cross_entropy_weights_N: Tensor | None = None  # needs labels; without: log-probabilities only
    temperature: float = 1.0  # of both sides of the divergences; cross-entropy is always at 1

    def __post_init__(self) -> None:
        """Reject combinations that would silently compute something else."""
        assert self.teacher is not None or not self.terms, "a divergence needs a teacher"
        assert self.labels_N is not None or self.cross_entropy_weights_N is None
        if isinstance(self.teacher, TeacherTopK) and self.temperature != 1.0:
            raise ValueError(
                f"loss.temperature must be 1 with targets.type: top_k, got {self.temperature}: the"
                " tail's mass at another temperature is not known; use targets.type: hidden"
            )


class HeadLoss(NamedTuple):
    """The answer. Only `loss` carries a gradient.

    A token whose divergence or cross-entropy is +inf (an id possible for one side only) keeps +inf
    in its value, adds nothing to the loss or the gradient by that term, and is counted. NaN, which
    only non-finite logits can cause, goes through to the loss.
    """

    loss: Tensor  # scalar, weighted sum
    divergences: tuple[Tensor, ...]  # [N] for each term, unweighted
    log_probs_N: Tensor | None  # of the labels, temperature 1
    num_infinite: Tensor  # scalar int64, over all terms and the cross-entropy


def plain_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    rule: LogitRule,
    vocabulary_size: int,
    request: LossRequest,
) -> HeadLoss:
    """The reference: all logits at once, autograd's own backward."""
    weight_VD = weight_VD[:vocabulary_size]
    bias_V = None if bias_V is None else bias_V[:vocabulary_size]
    logits_NV = finish_logits(hidden_ND.to(weight_VD.dtype) @ weight_VD.T, bias_V, rule)
    losses, divergences = [], []
    for term in request.terms:
        values_N = _plain_divergence(term.divergence, logits_NV, request)
        losses.append(weighted_sum(term.weights_N, values_N))
        divergences.append(values_N.detach())
    log_probs_N = None
    if request.labels_N is not None:
        log_q_NV = log_probabilities(logits_NV)
        log_probs_N = log_q_NV.gather(-1, request.labels_N.unsqueeze(-1)).squeeze(-1)
        log_probs_N = log_probs_N.masked_fill(log_probs_N <= FLOOR, -torch.inf)
        if request.cross_entropy_weights_N is not None:
            losses.append(weighted_sum(request.cross_entropy_weights_N, -log_probs_N))
        log_probs_N = log_probs_N.detach()
    loss = torch.stack(losses).sum() if losses else logits_NV.new_zeros(())
    return assemble(loss, tuple(divergences), log_probs_N)


def weighted_sum(weights_N: Tensor, values_N: Tensor) -> Tensor:
    """Sum of weight times value; infinite values are left out."""
    return (weights_N * values_N.masked_fill(values_N.isposinf(), 0.0)).sum()


def assemble(loss: Tensor, divergences: tuple[Tensor, ...], log_probs_N: Tensor | None) -> HeadLoss:
    """The answer with its infinite values counted."""
    values = [*divergences] if log_probs_N is None else [*divergences, log_probs_N]
    num_infinite = torch.zeros((), dtype=torch.int64, device=loss.device)
    for values_N in values:
        num_infinite = num_infinite + values_N.isinf().sum()
    return HeadLoss(loss, divergences, log_probs_N, num_infinite)


def _plain_divergence(
    divergence: config.Divergence, logits_NV: Tensor, request: LossRequest
) -> Tensor:
    log_q = log_probabilities(logits_NV / request.temperature)
    vocabulary_size = logits_NV.shape[-1]
    match request.teacher:
        case TeacherHidden(values_ND=values_ND, head=head):
            log_p = log_probabilities(head.logits(values_ND) / request.temperature)
        case TeacherLogits(values_NV=values_NV):
            teacher_NV = values_NV[:, :vocabulary_size].to(log_q.dtype)
            log_p = log_probabilities(teacher_NV / request.temperature)
        case TeacherTopK(ids_NK=ids_NK, log_probs_NK=log_probs_NK):
            log_p = teacher_buckets(log_probs_NK, vocabulary_size)
            log_q, _ = student_buckets(log_q, ids_NK)
        case None:
            raise AssertionError("a divergence needs a teacher")
    return divergence_of_log_probabilities(define(divergence), log_p.to(log_q.dtype), log_q)
