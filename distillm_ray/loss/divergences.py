"""The divergences between teacher and student, each defined once for all paths.

A definition takes log-probabilities and returns the value of each token and the slope dD/dlog q.
The plain functions below put `log_softmax` in front of a definition and let autograd apply the
chain rule. token_losses.py calls the same definitions for a chunk of tokens and applies it by hand:

    dD/dz = slope - q sum(slope)

A slope may differ from dD/dlog q by a multiple of q, which the softmax cancels.

Impossible ids (logit -inf) have the log-probability `FLOOR` instead of -inf, so that no product
0 * inf arises. Their probability is exactly 0, and a difference of more than half of FLOOR marks an
id that is possible for one side only. A token whose divergence is +inf has gradient zero.

Axes: T tokens, V vocabulary. p teacher, q student; natural logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from distillm_ray import config

Definition: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(log_p_TV, log_q_TV, q_TV) -> (values_T, slope_TV)`. The inputs are not modified."""

FLOOR = -1e30
# A ratio p/q above e^30 has a q below 1e-13, far below the rounding of a sum of probabilities.
# Without the bound the ratio overflows and is multiplied by a probability of zero.
MAX_LOG_RATIO = 30.0


def log_probabilities(logits_TV: Tensor) -> Tensor:
    """log_softmax in float32 (float64 stays float64), impossible ids at FLOOR instead of -inf."""
    dtype = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits_TV, dim=-1, dtype=dtype).clamp_min(FLOOR)


# ---- definitions -------------------------------------------------------------------------------


def _forward_kl(log_p_TV: Tensor, log_q_TV: Tensor, q_TV: Tensor) -> tuple[Tensor, Tensor]:
    p_TV = log_p_TV.exp()
    gap_TV = log_p_TV - log_q_TV
    values_T = _infinite_where_unsupported(gap_TV, (p_TV * gap_TV).sum(-1))
    return values_T, p_TV.neg_()


def _reverse_kl(log_p_TV: Tensor, log_q_TV: Tensor, q_TV: Tensor) -> tuple[Tensor, Tensor]:
    gap_TV = log_q_TV - log_p_TV
    slope_TV = q_TV * gap_TV
    return _infinite_where_unsupported(gap_TV, slope_TV.sum(-1)), slope_TV


def _jensen_shannon(
    log_p_TV: Tensor, log_q_TV: Tensor, q_TV: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    ratio_TV = _bounded_exp(log_q_TV - log_p_TV)
    log_m_over_p_TV = (ratio_TV * (1 - beta) + beta).log_()
    log_m_over_q_TV = ratio_TV.reciprocal_().mul_(beta).add_(1 - beta).log_()
    slope_TV = log_m_over_q_TV.mul_(q_TV).mul_(beta - 1)
    return slope_TV.sum(-1) - beta * (log_p_TV.exp() * log_m_over_p_TV).sum(-1), slope_TV


def _skew_kl(
    log_p_TV: Tensor, log_q_TV: Tensor, q_TV: Tensor, *, alpha: float | Tensor
) -> tuple[Tensor, Tensor]:
    ratio_TV = _bounded_exp(log_q_TV - log_p_TV)
    m_over_p_TV = ratio_TV.mul_(1 - alpha).add_(alpha)
    slope_TV = (q_TV / m_over_p_TV).mul_(alpha - 1)
    return -m_over_p_TV.log_().mul_(log_p_TV.exp()).sum(-1), slope_TV


def _skew_reverse_kl(
    log_p_TV: Tensor, log_q_TV: Tensor, q_TV: Tensor, *, alpha: float | Tensor
) -> tuple[Tensor, Tensor]:
    ratio_TV = _bounded_exp(log_p_TV - log_q_TV)
    m_over_q_TV = ratio_TV.mul_(1 - alpha).add_(alpha)
    bounded_TV = (q_TV / m_over_q_TV).mul_(alpha)
    negative_values_TV = m_over_q_TV.log_().mul_(q_TV)
    values_T = -negative_values_TV.sum(-1)
    return values_T, negative_values_TV.add_(bounded_TV).neg_()


def _total_variation(log_p_TV: Tensor, log_q_TV: Tensor, q_TV: Tensor) -> tuple[Tensor, Tensor]:
    excess_TV = q_TV - log_p_TV.exp()
    values_T = 0.5 * excess_TV.abs().sum(-1)
    return values_T, excess_TV.sign_().mul_(q_TV).mul_(0.5)


def _adaptive_kl(
    log_p_TV: Tensor, log_q_TV: Tensor, q_TV: Tensor, *, mu: float
) -> tuple[Tensor, Tensor]:
    head_T = _head_share_of_gap(log_p_TV.exp(), q_TV, mu)
    forward_T, forward_slope_TV = _forward_kl(log_p_TV, log_q_TV, q_TV)
    reverse_T, reverse_slope_TV = _reverse_kl(log_p_TV, log_q_TV, q_TV)
    # Where a weight is zero, its divergence may be infinite: 0 * inf would be NaN.
    values_T = torch.where(head_T > 0, head_T * forward_T, 0.0)
    values_T = values_T + torch.where(head_T < 1, (1 - head_T) * reverse_T, 0.0)
    forward_slope_TV.mul_(head_T.unsqueeze(-1))
    return values_T, forward_slope_TV.add_(reverse_slope_TV.mul_(1 - head_T.unsqueeze(-1)))


def _head_share_of_gap(p_TV: Tensor, q_TV: Tensor, mu: float) -> Tensor:
    """Share of the gap |p - q| that lies in the teacher's head; 1/2 where there is no gap.

    The head is the most likely ids whose cumulative mass is at most mu, and at least one id.
    """
    gap_TV = (p_TV - q_TV).abs()
    # A head usually has few ids: search the k most likely, and more while they do not reach mu.
    size, vocabulary = 64, p_TV.shape[-1]
    while True:
        top_TK, ids_TK = p_TV.topk(min(size, vocabulary), dim=-1)
        cumulative_TK = top_TK.cumsum(-1)
        if size >= vocabulary or bool((cumulative_TK[:, -1] > mu).all()):
            break
        size *= 8
    in_head_TK = cumulative_TK <= mu
    in_head_TK[:, 0] = True
    head_T = torch.where(in_head_TK, gap_TV.gather(-1, ids_TK), 0.0).sum(-1)
    total_T = gap_TV.sum(-1)
    return torch.where(total_T > 0, head_T / total_T, 0.5).clamp_max(1.0)


def _bounded_exp(log_ratio_TV: Tensor) -> Tensor:
    """exp, clamped to e^-MAX_LOG_RATIO ... e^MAX_LOG_RATIO. Overwrites its argument."""
    return log_ratio_TV.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp_()


def _infinite_where_unsupported(gap_TV: Tensor, values_T: Tensor) -> Tensor:
    """+inf if an id is possible for the first side of the gap and impossible for the second."""
    return values_T.masked_fill(gap_TV.amax(-1) > -FLOOR / 2, torch.inf)


# ---- the plain functions -----------------------------------------------------------------------


def forward_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor) -> Tensor:
    """KL(p || q) per token (Hinton et al. 2015, with the teacher's entropy kept: zero at p = q)."""
    return _differentiable(_forward_kl, student_logits_TV, teacher_logits_TV)


def reverse_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor) -> Tensor:
    """KL(q || p) per token (Gu et al. 2024, MiniLLM, eq. 1)."""
    return _differentiable(_reverse_kl, student_logits_TV, teacher_logits_TV)


def jensen_shannon(
    student_logits_TV: Tensor, teacher_logits_TV: Tensor, beta: float = 0.5
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) per token, with m = beta p + (1 - beta) q.

    Agarwal et al. 2024, GKD, eq. 1. beta 0 and 1 are refused: the divergence would be 0 everywhere.
    """
    definition = define(config.JensenShannon(beta=beta))
    return _differentiable(definition, student_logits_TV, teacher_logits_TV)


def skew_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) per token (Ko et al. 2024, DistiLLM, eq. 4)."""
    definition = define(config.SkewKL(alpha=alpha))
    return _differentiable(definition, student_logits_TV, teacher_logits_TV)


def skew_reverse_kl(
    student_logits_TV: Tensor, teacher_logits_TV: Tensor, alpha: float = 0.1
) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q) per token (Ko et al. 2024, DistiLLM, section 3.1)."""
    definition = define(config.SkewReverseKL(alpha=alpha))
    return _differentiable(definition, student_logits_TV, teacher_logits_TV)


def total_variation(student_logits_TV: Tensor, teacher_logits_TV: Tensor) -> Tensor:
    """Half the L1 distance of p and q per token (Wen et al. 2023, f-DISTILL)."""
    return _differentiable(_total_variation, student_logits_TV, teacher_logits_TV)


def adaptive_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor, mu: float = 0.5) -> Tensor:
    """Forward and reverse KL, weighted by the gaps over the teacher's head and tail.

    (g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail), g the sum of |p - q| over the head
    (teacher mass up to mu) and the tail; the weights carry no gradient (Wu et al. 2024, AKL).
    """
    definition = define(config.AdaptiveKL(mu=mu))
    return _differentiable(definition, student_logits_TV, teacher_logits_TV)


def define(divergence: config.Divergence, alphas_T: Tensor | None = None) -> Definition:
    """The definition of a config's divergence, with its parameters bound.

    `alphas_T` replaces the alpha of a skewed divergence by one for each token.
    """
    alphas_T1 = None if alphas_T is None else alphas_T.unsqueeze(-1)
    match divergence:
        case config.ForwardKL():
            return _forward_kl
        case config.ReverseKL():
            return _reverse_kl
        case config.JensenShannon(beta=beta):
            return partial(_jensen_shannon, beta=beta)
        case config.SkewKL(alpha=alpha):
            return partial(_skew_kl, alpha=alpha if alphas_T1 is None else alphas_T1)
        case config.SkewReverseKL(alpha=alpha):
            return partial(_skew_reverse_kl, alpha=alpha if alphas_T1 is None else alphas_T1)
        case config.TotalVariation():
            return _total_variation
        case config.AdaptiveKL(mu=mu):
            return partial(_adaptive_kl, mu=mu)


def _differentiable(
    definition: Definition, student_logits_TV: Tensor, teacher_logits_TV: Tensor
) -> Tensor:
    log_q_TV = log_probabilities(student_logits_TV)
    log_p_TV = log_probabilities(teacher_logits_TV.detach()).to(log_q_TV.dtype)
    return divergence_of_log_probabilities(definition, log_p_TV, log_q_TV)


def divergence_of_log_probabilities(
    definition: Definition, log_p_TV: Tensor, log_q_TV: Tensor
) -> Tensor:
    """Values per token, differentiable in log_q, which must be the output of a log-softmax."""
    values_T: Tensor = _Divergence.apply(log_p_TV, log_q_TV, definition)  # pyright: ignore[reportAssignmentType]
    return values_T


class _Divergence(torch.autograd.Function):
    """A definition as an autograd operation from log-probabilities to values."""

    @staticmethod
    def forward(ctx: Any, log_p_TV: Tensor, log_q_TV: Tensor, definition: Definition) -> Tensor:
        values_T, slope_TV = definition(log_p_TV, log_q_TV, log_q_TV.exp())
        ctx.save_for_backward(slope_TV, values_T)
        return values_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        slope_TV, values_T = ctx.saved_tensors
        gradient_T = gradients[0].masked_fill(values_T.isposinf(), 0.0)
        return None, slope_TV * gradient_T.unsqueeze(-1), None
