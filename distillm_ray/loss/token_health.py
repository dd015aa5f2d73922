"""How the two distributions compare at a sample of the student's own tokens: for the log.

The figures tell a healthy on-policy run from one that runs away: a student whose entropy collapses,
or whose text the teacher finds improbable, learns from text that nobody would write. They are
computed at a few tokens of each packed row, from the hidden states that the loss has already, so
they cost two small products with the heads and no pass through a model.

Axes: N loss positions, S sampled positions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distillm_ray.loss.divergences import FLOOR, log_probabilities
from distillm_ray.loss.teacher_tensors import (
    TeacherHidden,
    TeacherLogits,
    TeacherTensors,
    TeacherTopK,
)
from distillm_ray.types import BoolArray

MAX_TOKENS = 32
"""Sampled tokens of a packed row."""
TOP = 16
"""Ids of each side's most likely ones whose overlap is measured."""


class TokenHealth(NamedTuple):
    """Sums over the sampled tokens, float64 scalars on the device. NaN: the targets do not tell."""

    num_tokens: int
    student_entropy: Tensor  # nats
    teacher_entropy: Tensor
    overlap: Tensor  # share of the student's TOP most likely ids that are among the teacher's
    teacher_probability: Tensor  # of the token itself


def sampled_positions(is_student_N: BoolArray) -> Tensor | None:
    """`[S]`, at most MAX_TOKENS of the positions marked, evenly spread; None where none is."""
    positions = np.flatnonzero(is_student_N)
    if not len(positions):
        return None
    chosen = np.linspace(0, len(positions) - 1, min(MAX_TOKENS, len(positions)))
    return torch.from_numpy(positions[chosen.round().astype(np.int64)])


@torch.no_grad()
def token_health(
    student_logits_SV: Tensor,
    teacher: TeacherTensors,
    positions_S: Tensor,
    labels_S: Tensor,
) -> TokenHealth:
    """Compare both sides at `positions_S`, to which the student's logits and the labels belong.

    Top-k targets tell neither the teacher's entropy nor its probability of another id.
    """
    vocabulary_size = student_logits_SV.shape[-1]
    log_q_SV = log_probabilities(student_logits_SV)
    top = min(TOP, vocabulary_size)
    student_top_SK = log_q_SV.topk(top, dim=-1).indices
    log_p_SV: Tensor | None
    match teacher:
        case TeacherHidden(values_ND=values_ND, head=head):
            log_p_SV = log_probabilities(head.logits(values_ND[positions_S]))
        case TeacherLogits(values_NV=values_NV):
            log_p_SV = log_probabilities(values_NV[positions_S, :vocabulary_size])
        case TeacherTopK():
            log_p_SV = None
    unknown = torch.full((), torch.nan, dtype=torch.float64, device=student_logits_SV.device)
    if log_p_SV is not None:
        teacher_top_SK = log_p_SV.topk(top, dim=-1).indices
        teacher_entropy = _entropy(log_p_SV).sum()
        probability = _at(log_p_SV, labels_S).exp().double().sum()
    else:
        assert isinstance(teacher, TeacherTopK)
        log_probs_SK, ids_SK = teacher.log_probs_NK[positions_S], teacher.ids_NK[positions_S]
        top = min(top, ids_SK.shape[-1])
        student_top_SK = student_top_SK[:, :top]
        teacher_top_SK = ids_SK.gather(-1, log_probs_SK.topk(top, dim=-1).indices)
        teacher_entropy = probability = unknown
    shared_SKK = student_top_SK.unsqueeze(-1) == teacher_top_SK.unsqueeze(-2)
    return TokenHealth(
        num_tokens=len(positions_S),
        student_entropy=_entropy(log_q_SV).sum(),
        teacher_entropy=teacher_entropy,
        overlap=shared_SKK.any(-1).double().mean(-1).sum(),
        teacher_probability=probability,
    )


def _entropy(log_p_SV: Tensor) -> Tensor:
    return -(log_p_SV.exp() * log_p_SV.clamp_min(FLOOR)).sum(-1).double()


def _at(log_p_SV: Tensor, labels_S: Tensor) -> Tensor:
    return log_p_SV.gather(-1, labels_S.unsqueeze(-1)).squeeze(-1)
