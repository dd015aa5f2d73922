"""Held-out loss: teacher-forced cross-entropy, token mean, in nats.

`held_out_loss` loads a model directory; during a run the learners use `cross_entropy_sum` on the
student that they train.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from distillm_ray.batching import pack, plan_validation
from distillm_ray.config import (
    SAMPLED,
    CrossEntropy,
    Dtype,
    LossConfig,
    ReverseKL,
    Term,
    has_curriculum,
)
from distillm_ray.learner.step_statistics import counted_tokens
from distillm_ray.learner.student_model import (
    PackedStudent,
    label_logprobs,
    run_row,
    training_request,
)
from distillm_ray.loss.distillation_head import install_distillation_head
from distillm_ray.models.directory import Role
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.packed import load_packed_model
from distillm_ray.types import LearnerBatch, Rollout


def held_out_loss(
    model: Path,
    demonstrations: Sequence[Rollout],
    *,
    dtype: Dtype,
    vocabulary_size: int,
    max_batch_tokens: int,
    device: str,
    role: Role = "student",
    trust_remote_code: bool = False,
    num_threads: int | None = None,
) -> float:
    """Return the mean over all loss tokens of the demonstrations.

    `role` names the model in error messages.

    Raises:
        ModelError: the model cannot be loaded, or cannot run on packed rows.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    place = torch.device(device)
    loaded = load_packed_model(
        model,
        role=role,
        dtype=resolve_dtype(dtype, place),
        device=place,
        trust_remote_code=trust_remote_code,
    )
    install_distillation_head(loaded.model, vocabulary_size=vocabulary_size, role=role)
    packed_model = PackedStudent(loaded)
    (plans,) = plan_validation(demonstrations, num_ranks=1, max_micro_batch_tokens=max_batch_tokens)
    batches = [pack(plan, None) for plan in plans]
    total, num_tokens = cross_entropy_sum(packed_model, batches, place).tolist()
    return total / num_tokens


def cross_entropy_sum(
    student: nn.Module, batches: Sequence[LearnerBatch], device: torch.device
) -> Tensor:
    """`[2]`, float64: the cross-entropy summed over the loss tokens, in nats, and their number.

    Fillers are computed and not counted. The student is left in evaluation mode.
    """
    student.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        log_probs_N = label_logprobs(student, batch, device)
        counts_N = torch.from_numpy(counted_tokens(batch)).to(device)
        total[0] -= log_probs_N[counts_N].double().sum()
        total[1] += counts_N.sum()
    return total


@torch.no_grad()
def own_text_sum(
    student: nn.Module,
    batches: Sequence[LearnerBatch],
    loss: LossConfig,
    teacher_head: FrozenHead | None,
    device: torch.device,
) -> Tensor:
    """`[2]`, float64: the divergence summed over the student's own tokens, and their number.

    For prompts without a response: the rows hold what the student said to them. The divergence is
    that of the first term that has one on the student's text, else the reverse KL. A token whose
    divergence is +inf is left out. The student is left in evaluation mode.
    """
    student.eval()
    single = loss.model_copy(update={"terms": (own_text_term(loss),)})
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        request = training_request(batch, single, teacher_head, device)
        (values_N,) = run_row(student, batch, request, device).values
        counts_N = torch.from_numpy(counted_tokens(batch)).to(device) & ~values_N.isposinf()
        total[0] += values_N[counts_N].double().sum()
        total[1] += counts_N.sum()
    return total


def own_text_term(loss: LossConfig) -> Term:
    """The term whose value is the held-out loss where there are no held-out responses."""
    on_student = [term.formula for term in loss.terms if term.on in ("all", "student")]
    divergences = [term for term in on_student if not isinstance(term, SAMPLED)]
    if divergences:
        first = divergences[0]
        # A loss whose definition moves with the student could not be compared between steps.
        fixed = {"curriculum": False} if has_curriculum(first) else {}
        return first.model_copy(update=fixed)
    return ReverseKL() if loss.needs_teacher else CrossEntropy(on="student")
