"""The request to the student's output head for one micro-batch, its result, and the plain version.

`plain_loss` materialises all logits and leaves the gradient to autograd. It is the reference for
`fused.fused_loss`, which has the same signature and which training uses.

Axes: N loss positions, D hidden size, V vocabulary, M terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from distillm_ray import config
from distillm_ray.loss.curriculum import SequenceAlphas, sequence_alphas
from distillm_ray.loss.divergences import (
    FLOOR,
    define,
    divergence_of_log_probabilities,
    log_probabilities,
)
from distillm_ray.loss.policy_gradient import (
    SampledTokens,
    advantages,
    importance_weights,
    surrogate,
    teacher_log_probs,
)
from distillm_ray.loss.teacher_tensors import (
    TeacherHidden,
    TeacherLogits,
    TeacherTensors,
    TeacherTopK,
    student_buckets,
    teacher_buckets,
)
from distillm_ray.loss.token_health import TokenHealth
from distillm_ray.models.heads import finish_logits
from distillm_ray.models.logit_rules import LogitRule


class PolicyTokens(NamedTuple):
    """The loss of each token of a policy gradient, and its slope in log q(label)."""

    values_N: Tensor
    slopes_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightedTerm:
    """A term of the loss and the weight of each token's value in it.

    The weights already contain the term's own `weight` and are 0 where its `on` does not hold, so
    the computation reads neither of the two.
    """

    term: config.Term
    weights_N: Tensor
    anchor: float | None = None  # of a curriculum, once it is known
    policy: PolicyTokens | None = None  # of a policy gradient, once the samples are known
    alphas: SequenceAlphas | None = None  # of a curriculum, once the samples are known


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossRequest:
    """What to compute at N loss positions; every part may be left out.

    The loss is the sum over terms and tokens of weight times value, where the value is a divergence
    from the teacher or -log q(label). Tensors are on the device of the hidden states.
    """

    terms: tuple[WeightedTerm, ...] = ()
    teacher: TeacherTensors | None = None  # needed by divergences
    labels_N: Tensor | None = None  # int64; needed by cross-entropy and `needs_samples`
    temperature: float = 1.0  # of both sides of the divergences; sampled tokens are always at 1
    behaviour_N: Tensor | None = None  # log-probability that a label was sampled with; NaN: unknown
    sequence_N: Tensor | None = None  # int64; needed by policy gradients and curricula
    health_S: Tensor | None = None  # int64, positions at which to compare both sides for the log
    is_self_check: bool = False  # the student is its own teacher: every divergence must be 0

    def __post_init__(self) -> None:
        """Reject combinations that would silently compute something else."""
        assert self.teacher is not None or not self.divergences, "a divergence needs a teacher"
        assert self.labels_N is not None or len(self.divergences) == len(self.terms), (
            "cross-entropy needs labels"
        )
        if self.needs_samples:
            assert self.labels_N is not None, "sampled tokens are the labels"
        if isinstance(self.teacher, TeacherTopK) and self.temperature != 1.0:
            raise ValueError(
                f"loss.temperature must be 1 with targets.type: top_k, got {self.temperature}: the"
                " tail's mass at another temperature is not known; use targets.type: hidden"
            )

    @property
    def divergences(self) -> tuple[config.Divergence, ...]:
        """The divergences among the terms: their values depend on all ids, not on the label."""
        return tuple(one.term for one in self.terms if not isinstance(one.term, config.SAMPLED))

    @property
    def needs_samples(self) -> bool:
        """Whether a term depends on how probable the labels of whole sequences are today."""
        return self._compares_samples or any(
            one.term.max_importance is not None for one in self.terms
        )

    @property
    def _compares_samples(self) -> bool:
        """Whether a term depends on how probable the labels are for the teacher."""
        return any(
            isinstance(one.term, config.PolicyGradient) or config.has_curriculum(one.term)
            for one in self.terms
        )

    def with_samples(self, log_q_N: Tensor, *, vocabulary_size: int, chunk: int) -> LossRequest:
        """The request with policy gradients' tokens, curricula's alphas, and importance in weights.

        Args:
            log_q_N: the student's log-probabilities of the labels.
            chunk: tokens whose teacher logits exist at the same time.
        """
        log_q_N = log_q_N.detach()
        assert self.labels_N is not None
        log_p_N = torch.zeros_like(log_q_N)
        if self._compares_samples:
            assert self.teacher is not None, "sampled tokens are compared with a teacher's"
            log_p_N = teacher_log_probs(
                self.teacher, self.labels_N, vocabulary_size=vocabulary_size, chunk=chunk
            ).to(log_q_N.dtype)
        sequence_N = self.sequence_N
        tokens = SampledTokens(
            log_p_N=log_p_N,
            log_q_N=log_q_N,
            behaviour_N=self.behaviour_N,
            sequence_N=torch.zeros_like(self.labels_N) if sequence_N is None else sequence_N,
        )
        return replace(self, terms=tuple(_sampled(one, tokens) for one in self.terms))


def _sampled(one: WeightedTerm, tokens: SampledTokens) -> WeightedTerm:
    weights_N = one.weights_N
    if one.term.max_importance is not None:
        weights_N = weights_N * importance_weights(tokens, one.term.max_importance)
    policy = None
    if isinstance(one.term, config.PolicyGradient):
        advantages_N = advantages(one.term, tokens)
        policy = PolicyTokens(*surrogate(one.term, tokens.log_ratio_N, advantages_N))
    alphas = None
    if config.has_curriculum(one.term):
        alphas = sequence_alphas(
            one.term,
            one.anchor,
            log_p_N=tokens.log_p_N,
            log_q_N=tokens.log_q_N,
            sequence_N=tokens.sequence_N,
        )
    return replace(one, weights_N=weights_N, policy=policy, alphas=alphas)


class HeadLoss(NamedTuple):
    """The result. Only `loss` carries a gradient.

    A token whose divergence or cross-entropy is +inf (an id that is possible for one side only)
    keeps +inf in its value, adds nothing to the loss or the gradient of that term, and is counted.
    NaN, which only non-finite logits can cause, reaches the loss.
    """

    loss: Tensor  # scalar, the sum of `losses_M`
    losses_M: Tensor  # weighted sum of each term, in the order of the request
    values: tuple[Tensor, ...]  # [N] for each term, unweighted; of cross-entropy -log q(label)
    log_probs_N: Tensor | None  # of the labels, temperature 1
    num_infinite: Tensor  # scalar int64: infinite divergences and log-probabilities
    alphas: tuple[SequenceAlphas | None, ...] = ()  # for each term, None without a curriculum
    health: TokenHealth | None = None  # where the request names positions


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
    if request.needs_samples:
        labels_N1 = _labels(request).unsqueeze(-1)
        log_q_N = log_probabilities(logits_NV.detach()).gather(-1, labels_N1).squeeze(-1)
        request = request.with_samples(
            log_q_N, vocabulary_size=vocabulary_size, chunk=max(1, len(hidden_ND))
        )
    divergences = [
        _plain_divergence(one.term, one.alphas, logits_NV, request)
        for one in request.terms
        if not isinstance(one.term, config.SAMPLED)
    ]
    log_probs_N = None
    if request.labels_N is not None:
        log_q_NV = log_probabilities(logits_NV)
        log_probs_N = log_q_NV.gather(-1, request.labels_N.unsqueeze(-1)).squeeze(-1)
        log_probs_N = log_probs_N.masked_fill(log_probs_N <= FLOOR, -torch.inf)
    return assemble(request, divergences, log_probs_N, empty=logits_NV.new_zeros(0))


def assemble(
    request: LossRequest,
    divergences: Sequence[Tensor],
    log_probs_N: Tensor | None,
    *,
    empty: Tensor,
) -> HeadLoss:
    """Put the tokens' values in the order of the terms, weight and sum them.

    `empty` has no element; it gives dtype and device to the loss of a request without terms.
    """
    remaining = iter(divergences)
    values: list[Tensor] = []
    for one in request.terms:
        if isinstance(one.term, config.CrossEntropy):
            assert log_probs_N is not None
            values.append(-log_probs_N)
        elif isinstance(one.term, config.PolicyGradient):
            assert one.policy is not None and log_probs_N is not None
            # The slope carries the gradient; the added part is zero.
            known_N = log_probs_N.masked_fill(log_probs_N.isinf(), 0.0)
            moving_N = known_N - known_N.detach()
            values.append(one.policy.values_N + one.policy.slopes_N * moving_N)
        else:
            values.append(next(remaining))
    losses = [
        (one.weights_N * values_N.masked_fill(values_N.isposinf(), 0.0)).sum()
        for one, values_N in zip(request.terms, values, strict=True)
    ]
    losses_M = torch.stack(losses) if losses else empty
    num_infinite = torch.zeros((), dtype=torch.int64, device=empty.device)
    policies = [one.policy.values_N for one in request.terms if one.policy is not None]
    for values_N in (*divergences, *policies, *([] if log_probs_N is None else [log_probs_N])):
        num_infinite = num_infinite + values_N.isinf().sum()
    return HeadLoss(
        loss=losses_M.sum(),
        losses_M=losses_M.detach(),
        values=tuple(values_N.detach() for values_N in values),
        log_probs_N=None if log_probs_N is None else log_probs_N.detach(),
        num_infinite=num_infinite,
        alphas=tuple(one.alphas for one in request.terms),
    )


def _labels(request: LossRequest) -> Tensor:
    assert request.labels_N is not None
    return request.labels_N


def _plain_divergence(
    divergence: config.Divergence,
    alphas: SequenceAlphas | None,
    logits_NV: Tensor,
    request: LossRequest,
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
    definition = define(divergence, None if alphas is None else alphas.alphas_N)
    return divergence_of_log_probabilities(definition, log_p.to(log_q.dtype), log_q)
