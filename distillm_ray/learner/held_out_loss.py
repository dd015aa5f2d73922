"""Held-out loss of a model directory: teacher-forced cross-entropy, token mean, in nats.

During a run the learners compute the same quantity with their own engine; this is for a model on
disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from distillm_ray.batching import pack, plan_validation
from distillm_ray.config import Dtype
from distillm_ray.learner.student_model import PackedStudent
from distillm_ray.loss.distillation_head import install_distillation_head
from distillm_ray.loss.head_loss import HeadLoss, LossRequest
from distillm_ray.models.directory import Role
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.packed import load_packed_model
from distillm_ray.types import Rollout


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
    install_distillation_head(loaded, vocabulary_size=vocabulary_size, role=role)
    packed_model = PackedStudent(loaded)
    (plans,) = plan_validation(demonstrations, num_ranks=1, max_micro_batch_tokens=max_batch_tokens)
    total = 0.0
    num_tokens = 0
    with torch.no_grad():
        for plan in plans:
            batch = pack(plan, None)
            loss: HeadLoss = packed_model(
                torch.tensor(batch.token_ids_L, device=place),
                torch.tensor(batch.position_ids_L, device=place),
                torch.tensor(batch.loss_positions_N, device=place),
                LossRequest(labels_N=torch.tensor(batch.labels_N, device=place).long()),
            )
            assert loss.log_probs_N is not None
            total -= float(loss.log_probs_N.double().sum())
            num_tokens += len(batch.labels_N)
    return total / num_tokens
