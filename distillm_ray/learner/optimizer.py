"""The student's optimizer and its learning rate. Imports no DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from distillm_ray.config import LearnerConfig


def build_optimizer(
    config: LearnerConfig, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """torch's own optimizers, which need no compiler. DeepSpeed adds float32 master weights."""
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(
                parameters,
                lr=config.learning_rate,
                betas=config.adam_betas,
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
                fused=True,  # one pass over the states instead of ten
            )
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=config.learning_rate, weight_decay=config.weight_decay
            )


def learning_rate_at(step: int, config: LearnerConfig) -> float:
    """Linear warm-up, then a cosine down to `min_learning_rate_ratio` of the peak.

    `step` is 0-based. The first step of a warm-up has a rate above 0, and the last step of the run
    has the lowest rate after the warm-up.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = max(config.num_steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / decay_steps, 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    low = config.min_learning_rate_ratio
    return config.learning_rate * (low + (1.0 - low) * cosine)
