"""Teacher targets on the learner's device: the messages of types.py as torch tensors.

Axes: N loss positions, D hidden size, K top-k, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distillm_ray import types
from distillm_ray.loss.divergences import FLOOR
from distillm_ray.models.heads import FrozenHead

# The tail's mass is 1 minus a sum of float32 probabilities. Smaller values are rounding errors.
SMALLEST_TAIL = 2.0**-24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherHidden:
    """Inputs of the teacher's head, and the head."""

    values_ND: Tensor
    head: FrozenHead


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherTopK:
    """K distinct ids for each position, with their log-probabilities at temperature 1."""

    ids_NK: Tensor  # int64
    log_probs_NK: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherLogits:
    """All logits. Ids beyond the tokenizer's vocabulary are cut off; impossible ids are -inf."""

    values_NV: Tensor


TeacherTensors: TypeAlias = TeacherHidden | TeacherTopK | TeacherLogits


def teacher_tensors(
    targets: types.TeacherTargets, head: FrozenHead | None, device: torch.device | str
) -> TeacherTensors:
    """The message on the device, copied: arrays from the object store are shared and read-only."""
    match targets:
        case types.HiddenTargets(values_TD=values_TD):
            assert head is not None, "hidden targets need the teacher's head"
            return TeacherHidden(values_ND=_to_tensor(values_TD, device), head=head)
        case types.TopKTargets(ids_TK=ids_TK, log_probs_TK=log_probs_TK):
            return TeacherTopK(
                ids_NK=_to_tensor(ids_TK, device).long(),
                log_probs_NK=_to_tensor(log_probs_TK, device),
            )
        case types.LogitTargets(values_TV=values_TV):
            return TeacherLogits(values_NV=_to_tensor(values_TV, device))


def _to_tensor(array: NDArray[Any], device: torch.device | str) -> Tensor:
    """A copy on the device. uint16 arrays hold the bits of bfloat16 values."""
    tensor = torch.from_numpy(np.array(array, copy=True))
    if array.dtype == np.uint16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device)


# ---- top-k: K ids and one bucket for the tail ----------------------------------------------------


def teacher_buckets(log_probs_NK: Tensor, vocabulary_size: int) -> Tensor:
    """`[N, K + 1]`, the tail's log-probability last. The tail is impossible exactly if K = V."""
    num_ids = log_probs_NK.shape[-1]
    if num_ids == vocabulary_size:
        tail_N1 = torch.full_like(log_probs_NK[:, :1], FLOOR)
    else:
        mass_N1 = log_probs_NK.double().exp().sum(-1, keepdim=True)
        tail_N1 = (1 - mass_N1).clamp_min(SMALLEST_TAIL).log().to(log_probs_NK.dtype)
    return torch.cat((log_probs_NK, tail_N1), dim=-1).clamp_min(FLOOR)


def student_buckets(log_q_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The student's log-probabilities of the buckets `[N, K + 1]`, and within the tail `[N, V]`.

    The second result is the distribution given that the id is in the tail; the K ids have FLOOR.
    """
    in_head_NV = torch.zeros_like(log_q_NV, dtype=torch.bool).scatter_(-1, ids_NK, True)
    # Summed over the tail's ids: 1 minus the head's mass would round a small tail to zero.
    tail_NV = log_q_NV.masked_fill(in_head_NV, FLOOR)
    tail_N1 = tail_NV.logsumexp(-1, keepdim=True).clamp_min(FLOOR)
    buckets = torch.cat((log_q_NV.gather(-1, ids_NK), tail_N1), dim=-1)
    within_NV = (tail_NV - tail_N1).masked_fill(tail_NV <= FLOOR, FLOOR)
    return buckets, within_NV
