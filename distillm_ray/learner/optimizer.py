"""The student's optimizer and its learning rate. Imports no DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from distillm_ray.config import LearnerConfig
from distillm_ray.models.partitioned import whole_shape


def build_optimizer(
    config: LearnerConfig, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """torch's own optimizers, which need no compiler. DeepSpeed adds float32 master weights.

    Matrices decay, embeddings included. Vectors do not: biases and the scales of norms. There are
    two groups also without decay, so that a run can be resumed with another `weight_decay`.

    """
    matrices = [parameter for parameter in parameters if len(whole_shape(parameter)) >= 2]
    vectors = [parameter for parameter in parameters if len(whole_shape(parameter)) < 2]
    groups = [
        {"params": members, "decays": members is matrices}
        for members in (matrices, vectors)
        if members
    ]
    match config.optimizer:
        case "adamw":
            # Fused: one pass over the states instead of ten.
            optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        case "sgd":
            optimizer = torch.optim.SGD(groups, lr=config.learning_rate)
    set_hyperparameters(optimizer, config)
    return optimizer


def set_hyperparameters(optimizer: torch.optim.Optimizer, config: LearnerConfig) -> None:
    """Set what the config says, also in place of what a checkpoint brought."""
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
        if config.optimizer == "adamw":
            group["betas"] = config.adam_betas
            group["eps"] = config.adam_epsilon


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
