"""The elementwise part of the fused loss: logits of some rows to their values and gradient.

One function for every device. On a CPU it runs over a few rows at a time, so that its temporaries
stay in the cache; on CUDA it is compiled to kernels over the whole chunk. The mathematics of the
divergences is in divergences.py; here is the chain around it.

Axes: R rows (loss positions), V vocabulary, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distillm_ray import config
from distillm_ray.loss.divergences import FLOOR, define, log_probabilities
from distillm_ray.loss.teacher_tensors import student_buckets, teacher_buckets
from distillm_ray.models.heads import finish_logits, gradient_of_products
from distillm_ray.models.logit_rules import LogitRule

# Elements of one temporary on a CPU: 1.5 MB in float32.
BLOCK_ELEMENTS = 8 * 49_152


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything of the elementwise part that is not a tensor: what a kernel is compiled for."""

    divergences: tuple[config.Divergence, ...]
    student_rule: LogitRule
    teacher_rule: LogitRule
    temperature: float
    with_gradient: bool


class Rows(NamedTuple):
    """The tensors of some loss positions, R of them; None where the request has none."""

    products_RV: Tensor
    teacher: Tensor | None  # products [R, V], logits [R, V], or top-k log-probabilities [R, K]
    teacher_ids_RK: Tensor | None  # top-k only
    weights: tuple[Tensor, ...]  # [R] for each divergence
    labels_R: Tensor | None
    cross_entropy_weights_R: Tensor | None

    def between(self, start: int, stop: int) -> Rows:
        """Views of some of the rows."""
        return Rows(
            self.products_RV[start:stop],
            None if self.teacher is None else self.teacher[start:stop],
            None if self.teacher_ids_RK is None else self.teacher_ids_RK[start:stop],
            tuple(weights[start:stop] for weights in self.weights),
            None if self.labels_R is None else self.labels_R[start:stop],
            None
            if self.cross_entropy_weights_R is None
            else self.cross_entropy_weights_R[start:stop],
        )


def token_losses(
    recipe: Recipe, rows: Rows, bias_V: Tensor | None, teacher_bias_V: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """Values of each divergence, log-probabilities of the labels, gradient of `products_RV`."""
    logits_RV = finish_logits(rows.products_RV, bias_V, recipe.student_rule)
    values: tuple[Tensor, ...] = ()
    log_q_RV = log_probs_R = gradient_RV = None
    if recipe.divergences:
        log_q_RV = log_probabilities(_tempered(logits_RV, recipe.temperature))
        values, gradient_RV = _divergences(recipe, rows, log_q_RV, teacher_bias_V)
    if rows.labels_R is not None:
        if log_q_RV is None or recipe.temperature != 1.0:
            log_q_RV = log_probabilities(logits_RV)
        labels_R1 = rows.labels_R.unsqueeze(-1)
        log_probs_R = log_q_RV.gather(-1, labels_R1).squeeze(-1)
        log_probs_R = log_probs_R.masked_fill(log_probs_R <= FLOOR, -torch.inf)
        if recipe.with_gradient and rows.cross_entropy_weights_R is not None:
            # The gradient of -log q(label) is q - onehot(label).
            weights_R = rows.cross_entropy_weights_R.masked_fill(log_probs_R.isneginf(), 0.0)
            weights_R1 = weights_R.to(log_q_RV.dtype).unsqueeze(-1)
            pull_RV = log_q_RV.exp().mul_(weights_R1)
            gradient_RV = pull_RV if gradient_RV is None else gradient_RV.add_(pull_RV)
            gradient_RV.scatter_add_(-1, labels_R1, -weights_R1)
    if gradient_RV is not None:
        gradient_RV = gradient_of_products(gradient_RV, logits_RV, recipe.student_rule)
    return values, log_probs_R, gradient_RV


def _divergences(
    recipe: Recipe, rows: Rows, log_q_RV: Tensor, teacher_bias_V: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Values, and the gradient of the logits from all divergences (None if it is not wanted)."""
    assert rows.teacher is not None
    within_RV = None
    if rows.teacher_ids_RK is None:
        logits_RV = finish_logits(rows.teacher, teacher_bias_V, recipe.teacher_rule)
        log_p = log_probabilities(_tempered(logits_RV, recipe.temperature)).to(log_q_RV.dtype)
        log_q = log_q_RV
    else:
        log_p = teacher_buckets(rows.teacher, log_q_RV.shape[-1]).to(log_q_RV.dtype)
        log_q, within_RV = student_buckets(log_q_RV, rows.teacher_ids_RK)
    q = log_q.exp()
    values: list[Tensor] = []
    total: Tensor | None = None
    for divergence, weights_R in zip(recipe.divergences, rows.weights, strict=True):
        values_R, slope = define(divergence)(log_p, log_q, q)
        values.append(values_R)
        if recipe.with_gradient:
            weights_R = weights_R.masked_fill(values_R.isposinf(), 0.0).to(slope.dtype)
            slope.mul_(weights_R.unsqueeze(-1))
            total = slope if total is None else total.add_(slope)
    if total is None:
        return tuple(values), None
    gradient = total.sub_(q.mul_(total.sum(-1, keepdim=True)))
    if recipe.temperature != 1.0:
        gradient.div_(recipe.temperature)
    if within_RV is not None:
        # The tail's gradient falls to its ids by their share of it.
        assert rows.teacher_ids_RK is not None
        tail_RV = within_RV.exp_().mul_(gradient[:, -1:])
        gradient = tail_RV.scatter_(-1, rows.teacher_ids_RK, gradient[:, :-1])
    return tuple(values), gradient


def _tempered(logits_RV: Tensor, temperature: float) -> Tensor:
    return logits_RV if temperature == 1.0 else logits_RV / temperature


@lru_cache
def _compiled(recipe: Recipe) -> Callable[..., tuple[Any, ...]]:
    """The elementwise part as generated kernels."""
    return torch.compile(partial(in_place, recipe))


def in_place(
    recipe: Recipe, rows: Rows, bias_V: Tensor | None, teacher_bias_V: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """`token_losses` with the gradient written over the products."""
    values, log_probs_R, gradient_RV = token_losses(recipe, rows, bias_V, teacher_bias_V)
    if gradient_RV is not None:
        rows.products_RV.copy_(gradient_RV)
    return values, log_probs_R


def token_losses_in_place(
    recipe: Recipe, rows: Rows, bias_V: Tensor | None, teacher_bias_V: Tensor | None
) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
    """Values and log-probabilities by blocks; the products are overwritten by their gradient."""
    num_rows, vocabulary_size = rows.products_RV.shape
    if rows.products_RV.is_cuda:
        for tensor in (rows.products_RV, rows.teacher):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return [_compiled(recipe)(rows, bias_V, teacher_bias_V)]
    block = max(1, BLOCK_ELEMENTS // vocabulary_size)
    return [
        in_place(recipe, rows.between(start, start + block), bias_V, teacher_bias_V)
        for start in range(0, num_rows, block)
    ]
