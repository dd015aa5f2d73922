"""The elementwise part of the fused loss: from logits to values and the gradient of the logits.

All devices share one function, `elementwise`. On a CPU it runs over a few rows at a time, so that
its temporaries stay in the cache. On CUDA it is compiled to one kernel for the whole chunk. That
kernel reads a row three times (normalizers, values, gradient) and stores only its results:
recomputing intermediate values costs less than writing and reading them. divergences.py defines the
divergences; this module applies the chain rule to them.

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

# Elements of one temporary if the operations run one by one: 1.5 MB in float32 on a CPU, 128 MB on
# a GPU, whose kernels need many rows.
BLOCK_ELEMENTS = {"cpu": 8 * 49_152, "cuda": 2**25}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All inputs of the elementwise part that are not tensors. A kernel is compiled for each one.

    The divergences are formulas (`LossTerm.formula`): weights arrive as tensors.
    """

    divergences: tuple[config.Divergence, ...]
    student_rule: LogitRule
    teacher_rule: LogitRule
    temperature: float
    with_gradient: bool


class Rows(NamedTuple):
    """The tensors of R loss positions; None for what the request does not have."""

    products_RV: Tensor
    teacher: Tensor | None  # products [R, V], logits [R, V], or top-k log-probabilities [R, K]
    teacher_ids_RK: Tensor | None  # top-k only
    weights: tuple[Tensor, ...]  # [R] for each divergence
    alphas: tuple[Tensor | None, ...]  # [R] for each divergence with a curriculum
    labels_R: Tensor | None
    cross_entropy_weights_R: Tensor | None  # summed over the cross-entropy terms

    def between(self, start: int, stop: int) -> Rows:
        """Views of the rows from `start` to `stop`."""
        return tree_map_only(Tensor, lambda tensor: tensor[start:stop], self)


class RowLosses(NamedTuple):
    """The results for some rows, besides the gradient of their products."""

    values: tuple[Tensor, ...]  # [R] for each divergence
    log_probs_R: Tensor | None  # of the labels


def token_losses_in_place(
    recipe: Recipe, rows: Rows, bias_V: Tensor | None, teacher_bias_V: Tensor | None
) -> list[RowLosses]:
    """The losses of each block of rows. If wanted, the gradient overwrites `products_RV`."""
    products_RV = rows.products_RV
    num_rows, vocabulary_size = products_RV.shape
    device = products_RV.device.type
    if device == "cuda" and _is_one_graph(recipe):
        run, block = compiled(recipe, top_k=rows.teacher_ids_RK is not None), num_rows
    else:
        run, block = partial(elementwise, recipe), max(1, BLOCK_ELEMENTS[device] // vocabulary_size)
    blocks: list[RowLosses] = []
    for start in range(0, num_rows, block):
        some = rows.between(start, start + block)
        losses, gradient_RK = run(some, bias_V, teacher_bias_V)
        blocks.append(losses)
        if gradient_RK is not None:
            assert some.teacher_ids_RK is not None
            some.products_RV.scatter_add_(
                -1, some.teacher_ids_RK, gradient_RK.to(products_RV.dtype)
            )
    return blocks


def _is_one_graph(recipe: Recipe) -> bool:
    """Whether the compiler can trace the recipe. Adaptive KL branches on values."""
    return not any(isinstance(one, config.AdaptiveKL) for one in recipe.divergences)


@lru_cache
def compiled(recipe: Recipe, *, top_k: bool) -> Callable[..., tuple[RowLosses, Tensor | None]]:
    """`elementwise` as a kernel for any number of rows."""
    # By default Inductor stores every value that is used more than once, each a [R, V] matrix in
    # float32, and splits the rows over several kernels if there are few.
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
            if tensor is not None:  # the size of a chunk differs between micro-batches
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return kernel(rows, bias_V, teacher_bias_V)

    return run


# ---- the mathematics of a row --------------------------------------------------------------------


def elementwise(
    recipe: Recipe, rows: Rows, bias_V: Tensor | None, teacher_bias_V: Tensor | None
) -> tuple[RowLosses, Tensor | None]:
    """The losses. If wanted, the gradient of the products overwrites them.

    With top-k targets the gradient of the K ids does not yet contain the divergences' part. That
    part is the second result, `[R, K]`, for the caller to add: adding it here would make the
    compiler store the gradient twice.
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
    """Values, and if wanted the gradient of the logits, summed over all divergences.

    With top-k targets the second result is the gradient of the tail's ids, and the third, `[R, K]`,
    that of the K ids.
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
    for divergence, weights_R, alphas_R in zip(
        recipe.divergences, rows.weights, rows.alphas, strict=True
    ):
        values_R, term = define(divergence, alphas_R)(log_p, log_q, q)
        values.append(values_R)
        if recipe.with_gradient:
            weights_R1 = weights_R.masked_fill(values_R.isposinf(), 0.0).to(term.dtype)[:, None]
            # Summed before weighting, so that one pass over the row finds values and this sum.
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
    # Each id of the tail gets its share of the tail bucket's gradient.
    return tuple(values), within_RV.exp_().mul_(gradient[:, -1:]), gradient[:, :-1]


def _add_at(gradient_RV: Tensor, ids_R1: Tensor, amounts_R1: Tensor) -> Tensor:
    """Add an amount to one id of each row."""
    if not torch.compiler.is_compiling():
        return gradient_RV.scatter_add_(-1, ids_R1, amounts_R1)
    # In a kernel a comparison costs nothing. A scatter would store the gradient and read it again.
    ids_V = torch.arange(gradient_RV.shape[-1], device=gradient_RV.device)
    return gradient_RV + torch.where(ids_V == ids_R1, amounts_R1, 0.0)


def _tempered(logits_RV: Tensor, temperature: float) -> Tensor:
    return logits_RV if temperature == 1.0 else logits_RV / temperature
