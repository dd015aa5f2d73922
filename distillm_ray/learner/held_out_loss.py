"""Held-out loss of a model directory: teacher-forced cross-entropy, token mean, in nats.

The learners compute the same during a run with their own engine; this is for a model on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from distillm_ray.batching import pack, plan_validation
from distillm_ray.config import Dtype, StudentConfig
from distillm_ray.learner.student_model import PackedStudent, load_student
from distillm_ray.loss.distillation_head import install_distillation_head
from distillm_ray.loss.head_loss import HeadLoss, LossRequest
from distillm_ray.types import Rollout


def held_out_loss(
    model: Path,
    demonstrations: Sequence[Rollout],
    *,
    dtype: Dtype,
    vocabulary_size: int,
    max_batch_tokens: int,
    device: str,
    trust_remote_code: bool = False,
    num_threads: int | None = None,
) -> float:
    """Mean over all loss tokens of the demonstrations.

    Raises:
        ModelError: the model cannot be loaded.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    place = torch.device(device)
    settings = StudentConfig(model=model, dtype=dtype, trust_remote_code=trust_remote_code)
    loaded = load_student(settings, device=place, zero_stage=1).eval()
    install_distillation_head(loaded, vocabulary_size=vocabulary_size)
    student = PackedStudent(loaded)
    (plans,) = plan_validation(demonstrations, num_ranks=1, max_micro_batch_tokens=max_batch_tokens)
    total = 0.0
    num_tokens = 0
    with torch.no_grad():
        for plan in plans:
            batch = pack(plan, None)
            answer: HeadLoss = student(
                torch.tensor(batch.token_ids_L, device=place),
                torch.tensor(batch.position_ids_L, device=place),
                torch.tensor(batch.loss_positions_N, device=place),
                LossRequest(labels_N=torch.tensor(batch.labels_N, device=place).long()),
            )
            assert answer.log_probs_N is not None
            total -= float(answer.log_probs_N.double().sum())
            num_tokens += len(batch.labels_N)
    return total / num_tokens
