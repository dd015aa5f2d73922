"""The policy gradient of the reverse KL at the tokens that the student sampled.

A token's reward is log p(y) - log q(y), teacher against student: its mean under the student is
minus the reverse KL. The surrogate of PPO (Schulman et al., 2017, eq. 7) turns advantages into a
loss, and its clipped ratio bounds what stale samples can do.

Everything here is at temperature 1 and about one number a token, so it costs no second backward:
with the advantage as a constant, the gradient is that of a weighted cross-entropy.

Axes: N loss positions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distillm_ray.config import PolicyGradient
from distillm_ray.loss.divergences import FLOOR, log_probabilities
from distillm_ray.loss.teacher_tensors import (
    TeacherHidden,
    TeacherLogits,
    TeacherTensors,
    TeacherTopK,
)

MAX_LOG_RATIO = 20.0
"""Of q(y) to the probability that y was sampled with. A larger one would overflow."""


class SampledTokens(NamedTuple):
    """What is known of each sampled token; no gradient flows through it."""

    log_p_N: Tensor  # the teacher's log-probability
    log_q_N: Tensor  # the student's, under the weights that are trained
    behaviour_N: Tensor | None  # the log-probability it was sampled with; NaN: not known
    sequence_N: Tensor  # int64, which sequence the token belongs to; tokens are in order

    @property
    def log_ratio_N(self) -> Tensor:
        """log q(y) - log b(y), with b the distribution that y was sampled from."""
        if self.behaviour_N is None:
            return torch.zeros_like(self.log_q_N)
        gap_N = self.log_q_N - self.behaviour_N.to(self.log_q_N.dtype)
        return gap_N.nan_to_num(0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def advantages(term: PolicyGradient, tokens: SampledTokens) -> Tensor:
    """`[N]`, the reward that a token is responsible for.

    `horizon: token` is the token's own reward. `horizon: rest` is the mean reward of the tokens
    after it, 0 for the last one (MiniLLM, Gu et al., ICLR 2024, section 2.2: the long part, length
    normalized). A reward of -inf (an id that the teacher excludes) stays -inf for its own token and
    is left out of the means.

    Example:
        >>> tokens = SampledTokens(
        ...     log_p_N=torch.tensor([-1.0, -2.0, -3.0]), log_q_N=torch.full((3,), -1.0),
        ...     behaviour_N=None, sequence_N=torch.zeros(3, dtype=torch.int64),
        ... )
        >>> advantages(PolicyGradient(), tokens).tolist()
        [0.0, -1.0, -2.0]
        >>> advantages(PolicyGradient(horizon="rest"), tokens).tolist()
        [-1.5, -2.0, 0.0]
    """
    rewards_N = tokens.log_p_N - tokens.log_q_N
    if term.horizon == "token":
        return rewards_N
    known_N = rewards_N.isfinite()
    rewards_N = rewards_N.masked_fill(~known_N, 0.0).double()
    after_N = _sums_after(rewards_N, tokens.sequence_N)
    count_N = _sums_after(known_N.double(), tokens.sequence_N)
    return (after_N / count_N.clamp_min(1.0)).to(tokens.log_q_N.dtype)


def surrogate(
    term: PolicyGradient, log_ratio_N: Tensor, advantages_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of each token, and its slope in log q(y), `[N]` each.

    The loss is -min(r A, clip(r, 1 - clip, 1 + clip) A). Where the clipped side is the smaller, the
    slope is 0. An advantage of -inf gives +inf with slope 0.
    """
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1.0 - term.clip, 1.0 + term.clip)
    finite_N = advantages_N.isfinite()
    safe_N = advantages_N.masked_fill(~finite_N, 0.0)
    values_N = -torch.minimum(ratio_N * safe_N, clipped_N * safe_N)
    free_N = (ratio_N * safe_N <= clipped_N * safe_N) & finite_N
    slopes_N = torch.where(free_N, -ratio_N * safe_N, 0.0)
    return values_N.masked_fill(~finite_N, torch.inf), slopes_N


def importance_weights(tokens: SampledTokens, largest: float) -> Tensor:
    """`[N]`, min(q(y) / b(y), largest): how far a sampled token counts under today's student."""
    return tokens.log_ratio_N.exp().clamp_max(largest)


@torch.no_grad()
def teacher_log_probs(
    teacher: TeacherTensors, labels_N: Tensor, *, vocabulary_size: int, chunk: int
) -> Tensor:
    """`[N]`, the teacher's log-probability of each label, in float32 (float64 stays).

    Args:
        chunk: tokens whose logits exist at the same time.
    """
    match teacher:
        case TeacherHidden(values_ND=values_ND, head=head):
            logits = (head.logits(part_ND) for part_ND in values_ND.split(chunk))
        case TeacherLogits(values_NV=values_NV):
            logits = (part_NV[:, :vocabulary_size] for part_NV in values_NV.split(chunk))
        case TeacherTopK():
            raise AssertionError("the config refuses sampled tokens with top-k targets")
    found = [
        log_probabilities(logits_CV).gather(-1, labels_C.unsqueeze(-1)).squeeze(-1)
        for logits_CV, labels_C in zip(logits, labels_N.split(chunk), strict=True)
    ]
    log_p_N = torch.cat(found) if found else labels_N.new_zeros(0, dtype=torch.float32)
    return log_p_N.masked_fill(log_p_N <= FLOOR, -torch.inf)


def _sums_after(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """For each token the sum over the later tokens of its sequence."""
    running_N = values_N.cumsum(0)
    if not len(values_N):
        return running_N
    # The running sum at the last token of each sequence, for each of its tokens.
    last_S = torch.zeros(int(sequence_N.max()) + 1, dtype=torch.int64, device=sequence_N.device)
    last_S.scatter_reduce_(
        0, sequence_N, torch.arange(len(values_N), device=sequence_N.device), "amax"
    )
    return running_N[last_S[sequence_N]] - running_N
