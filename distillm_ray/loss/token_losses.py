"""The elementwise part of the fused loss: logits of some rows to their values and gradient.

One function for every device. On a CPU it runs over a few rows at a time, so that its temporaries
stay in the cache; on CUDA it is compiled to one kernel over the whole chunk, which walks a row
three times (normalizers, values, gradient) and stores nothing but its results: the second and the
third time compute again what the one before knew. The mathematics of the divergences is in
divergences.py; here is the chain around it.

Axes: R rows (loss positions), V vocabulary, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from distillm_ray import config
from distillm_ray.loss.divergences import FLOOR, define, log_probabilities
from distillm_ray.loss.teacher_tensors import student_buckets, teacher_buckets
from distillm_ray.models.heads import finish_logits, gradient_of_products
from distillm_ray.models.logit_rules import LogitRule

# Elements of one temporary where the operations run one by one: 1.5 MB in float32 on a CPU; on a
# GPU, whose kernels want many rows, 128 MB.
BLOCK_ELEMENTS = {"cpu": 8 * 49_152, "cuda": 2**25}


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
        return tree_map_only(Tensor, lambda tensor: tensor[start:stop], self)


class RowLosses(NamedTuple):
    """What is computed of some rows, besides the gradient of their products."""

    values: tuple[Tensor, ...]  # [R] for each divergence
    log_probs_R: Tensor | None  # of the labels


def token_losses_in_place(
    recipe: Recipe, rows: Rows, bias_V: Tensor | None, teacher_bias_V: Tensor | None
) -> list[RowLosses]:
    """The losses by blocks of rows; a wanted gradient is written over `products_RV`."""
    products_RV = rows.products_RV
    num_rows, vocabulary_size = products_RV.shape
    device = products_RV.device.type
    if device == "cuda" and _is_one_graph(recipe):
        run, block = compiled(recipe, top_k=rows.teacher_ids_RK is not None), num_rows
    else:
        run, block = partial(elementwise, recipe), max(1, BLOCK_ELEMENTS[device] // vocabulary_size)
    answers: list[RowLosses] = []
    for start in range(0, num_rows, block):
        some = rows.between(start, start + block)
        answer, gradient_RK = run(some, bias_V, teacher_bias_V)
        answers.append(answer)
        if gradient_RK is not None:
            assert some.teacher_ids_RK is not None
            some.products_RV.scatter_add_(
                -1, some.teacher_ids_RK, gradient_RK.to(products_RV.dtype)
            )
    return answers


def _is_one_graph(recipe: Recipe) -> bool:
    """Adaptive KL looks at values to know how many ids make a teacher's head."""
    return not any(isinstance(one, config.AdaptiveKL) for one in recipe.divergences)


@lru_cache
def compiled(recipe: Recipe, *, top_k: bool) -> Callable[..., tuple[RowLosses, Tensor | None]]:
    """`elementwise` as a kernel for any number of rows."""
    # Left to itself Inductor stores what is used more than once, a [R, V] matrix in float32 each
    # time, and splits rows over several kernels where there are few.
    never = 1_000_000
    options: dict[str, Any] = {
        "realize_reads_threshold": never,
        "realize_opcount_threshold": never,
        "split_reductions": False,
    }
    if not top_k:  # the [R, K + 1] buckets of top-k targets are worth storing
        options["realize_acc_reads_threshold"] = never
    kernel = torch.compile(partial(elementwise, recipe), options=options)

    def run(
        rows: Rows, bias_V: Tensor | None, teacher_bias_V: Tensor | None
    ) -> tuple[RowLosses, Tensor | None]:
        for tensor in tree_leaves(rows):
            if tensor is not None:  # every micro-batch has chunks of another size
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return kernel(rows, bias_V, teacher_bias_V)

    return run


# ---- the mathematics of a row --------------------------------------------------------------------


def elementwise(
    recipe: Recipe, rows: Rows, bias_V: Tensor | None, teacher_bias_V: Tensor | None
) -> tuple[RowLosses, Tensor | None]:
    """The losses, with the gradient of the products written over them if it is wanted.

    With top-k targets the K ids still miss what comes from the divergences. That is the second
    answer, `[R, K]`: added in here, it would make the compiler store the gradient twice.
    """
    logits_RV = finish_logits(rows.products_RV, bias_V, recipe.student_rule)
    values: tuple[Tensor, ...] = ()
    log_q_RV = log_probs_R = gradient_RV = gradient_RK = None
    if recipe.divergences:
        log_q_RV = log_probabilities(_tempered(logits_RV, recipe.temperature))
        values, gradient_RV, gradient_RK = _divergences(recipe, rows, log_q_RV, teacher_bias_V)
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
            pull_RV = _add_at(log_q_RV.exp().mul_(weights_R1), labels_R1, -weights_R1)
            gradient_RV = pull_RV if gradient_RV is None else gradient_RV.add_(pull_RV)
    if gradient_RK is not None:
        assert rows.teacher_ids_RK is not None
        logits_RK = logits_RV.gather(-1, rows.teacher_ids_RK)
        gradient_RK = gradient_of_products(gradient_RK, logits_RK, recipe.student_rule)
    if gradient_RV is not None:
        rows.products_RV.copy_(gradient_of_products(gradient_RV, logits_RV, recipe.student_rule))
    return RowLosses(values, log_probs_R), gradient_RK


def _divergences(
    recipe: Recipe, rows: Rows, log_q_RV: Tensor, teacher_bias_V: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """Values, and the gradient of the logits from all divergences if it is wanted.

    With top-k targets the gradient is that of the tail's ids, and the K ids' `[R, K]` is the third.
    """
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
    slope = slope_sum_R1 = None
    for divergence, weights_R in zip(recipe.divergences, rows.weights, strict=True):
        values_R, term = define(divergence)(log_p, log_q, q)
        values.append(values_R)
        if recipe.with_gradient:
            weights_R1 = weights_R.masked_fill(values_R.isposinf(), 0.0).to(term.dtype)[:, None]
            # Summed before it is weighted: both sums of a row are then found in one walk.
            term_sum_R1 = term.sum(-1, keepdim=True) * weights_R1
            term.mul_(weights_R1)
            slope = term if slope is None else slope.add_(term)
            slope_sum_R1 = term_sum_R1 if slope_sum_R1 is None else slope_sum_R1 + term_sum_R1
    if slope is None or slope_sum_R1 is None:
        return tuple(values), None, None
    gradient = slope.sub_(q.mul_(slope_sum_R1))
    if recipe.temperature != 1.0:
        gradient.div_(recipe.temperature)
    if within_RV is None:
        return tuple(values), gradient, None
    # The tail's gradient falls to its ids by their share of it.
    return tuple(values), within_RV.exp_().mul_(gradient[:, -1:]), gradient[:, :-1]


def _add_at(gradient_RV: Tensor, ids_R1: Tensor, amounts_R1: Tensor) -> Tensor:
    """One id of each row gets an amount."""
    if not torch.compiler.is_compiling():
        return gradient_RV.scatter_add_(-1, ids_R1, amounts_R1)
    # In a kernel a comparison costs nothing; a scatter would store the gradient and read it again.
    ids_V = torch.arange(gradient_RV.shape[-1], device=gradient_RV.device)
    return gradient_RV + torch.where(ids_V == ids_R1, amounts_R1, 0.0)


def _tempered(logits_RV: Tensor, temperature: float) -> Tensor:
    return logits_RV if temperature == 1.0 else logits_RV / temperature
