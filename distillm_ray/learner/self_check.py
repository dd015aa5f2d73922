"""A check of the loss on the first batch of a run: a student that is its own teacher costs nothing.

Every divergence and every policy gradient is 0 there, for any weights and any text. A loss that is
not has another minimum than the teacher.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from distillm_ray.config import CrossEntropy, LossConfig
from distillm_ray.errors import ModelError
from distillm_ray.learner.student_model import run_row, training_request
from distillm_ray.models.heads import FrozenHead
from distillm_ray.types import LearnerBatch

TOLERANCE = 1e-4
"""Nats a token. Rounding in float32 gives about 1e-7."""


@torch.no_grad()
def largest_self_divergence(
    student: nn.Module,
    batch: LearnerBatch,
    loss: LossConfig,
    teacher_head: FrozenHead | None,
    device: torch.device,
) -> float:
    """The largest value of any term at any token of the row; 0 but for rounding."""
    student.eval()
    request = training_request(batch, loss, teacher_head, device)
    request = replace(request, is_self_check=True, health_S=None)
    result = run_row(student, batch, request, device)
    largest = [
        values_N.abs().max()
        for one, values_N in zip(request.terms, result.values, strict=True)
        if not isinstance(one.term, CrossEntropy) and len(values_N)
    ]
    return float(torch.stack(largest).max()) if largest else 0.0


def describe_self_check(largest: float) -> str:
    """The sentence for the log.

    Raises:
        ModelError: the loss is not 0 where it must be.
    """
    if not largest <= TOLERANCE:
        raise ModelError(
            f"the loss of the student against itself must be 0, got {largest:.3g} nats at a token"
            f" of the first batch, more than {TOLERANCE:g}: its minimum would not be the teacher;"
            " try loss.implementation=plain and student.dtype=float32, and report the model"
        )
    return (
        f"the student against itself costs at most {largest:.1e} nats at a token of the first batch"
    )
