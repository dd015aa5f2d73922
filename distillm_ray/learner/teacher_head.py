"""The learner's copy of the teacher's output head, which `hidden` targets need."""

from __future__ import annotations

import torch

from distillm_ray.config import Config
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.heads import FrozenHead, load_frozen_head
from distillm_ray.remote.inputs import fetched


def teacher_head(
    config: Config, *, vocabulary_size: int, device: torch.device
) -> FrozenHead | None:
    """The frozen head on the learner's device; None where no target needs it.

    Raises:
        ModelError: the head cannot be loaded.
    """
    teacher = config.teacher
    if teacher is None or not config.loss.needs_teacher or config.targets.type != "hidden":
        return None
    return load_frozen_head(
        fetched(teacher.model),
        vocabulary_size=vocabulary_size,
        dtype=resolve_dtype(teacher.dtype, device),
        device=device,
        trust_remote_code=teacher.trust_remote_code,
    )
