"""The kinds of teacher targets on the same batch: bytes a token, and the error they make.

    python bench/teacher_targets.py [--student DIR]

The quickstart's teacher and student on its prompts. Against the exact divergence in float32 it
compares the mean over the tokens, each token's value, and the gradient that reaches the student's
hidden states.

Axes: N positions, V vocabulary, K top-k.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import write
from _quickstart import STUDENT, TEACHER, Positions, load_positions
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distillm_ray.config import Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL
from distillm_ray.loss.fused import fused_loss
from distillm_ray.loss.head_loss import LossRequest, WeightedTerm
from distillm_ray.loss.teacher_tensors import (
    TeacherHidden,
    TeacherLogits,
    TeacherTensors,
    TeacherTopK,
)
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.logit_rules import LogitRule

DIVERGENCES: tuple[Divergence, ...] = (SkewKL(), ForwardKL(), SkewReverseKL(), ReverseKL())


def evaluate(
    positions: Positions, teacher: TeacherTensors, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """Each token's value, and the gradient of its hidden state (as the student sees it)."""
    hidden_ND = positions.student_hidden_ND.clone().requires_grad_()
    result = fused_loss(
        hidden_ND,
        positions.student_head.weight_VD,
        None,
        rule=LogitRule(),
        vocabulary_size=len(positions.student_head.weight_VD),
        request=LossRequest(
            terms=(WeightedTerm(term=divergence, weights_N=torch.ones(len(hidden_ND))),),
            teacher=teacher,
        ),
    )
    result.loss.backward()
    assert hidden_ND.grad is not None
    return result.values[0], hidden_ND.grad


def kinds(positions: Positions) -> dict[str, tuple[int, Callable[[], TeacherTensors]]]:
    """Bytes a token, and the targets."""
    hidden_ND, head = positions.teacher_hidden_ND, positions.teacher_head
    log_p_NV = torch.log_softmax(head.logits(hidden_ND), -1)
    width, vocabulary = hidden_ND.shape[1], log_p_NV.shape[1]
    rounded = FrozenHead(weight_VD=head.weight_VD.bfloat16(), rule=head.rule)

    def top_k(k: int) -> TeacherTensors:
        top = log_p_NV.topk(k)
        return TeacherTopK(ids_NK=top.indices, log_probs_NK=top.values)

    return {
        "hidden, float32": (4 * width, lambda: TeacherHidden(values_ND=hidden_ND, head=head)),
        "hidden, bfloat16": (
            2 * width,
            lambda: TeacherHidden(values_ND=hidden_ND.bfloat16(), head=rounded),
        ),
        "logits, float32": (4 * vocabulary, lambda: TeacherLogits(values_NV=log_p_NV)),
        "logits, bfloat16": (
            2 * vocabulary,
            lambda: TeacherLogits(values_NV=head.logits(hidden_ND).bfloat16()),
        ),
        **{
            f"top_k, k = {k}": (8 * k, lambda k=k: top_k(k))  # int32 ids, float32 values
            for k in (16, 64, 256)
        },
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--student", type=Path, default=STUDENT)
    parser.add_argument("--positions", type=int, default=512)
    arguments = parser.parse_args()
    positions = load_positions(arguments.positions, arguments.teacher, arguments.student)
    exact = TeacherHidden(values_ND=positions.teacher_hidden_ND, head=positions.teacher_head)
    rows: list[dict[str, Any]] = []
    for divergence in DIVERGENCES:
        exact_N, exact_ND = evaluate(positions, exact, divergence)
        for name, (nbytes, targets) in kinds(positions).items():
            values_N, gradient_ND = evaluate(positions, targets(), divergence)
            cosine_N = torch.nn.functional.cosine_similarity(gradient_ND, exact_ND, dim=-1)
            rows.append(
                {
                    "divergence": divergence.type,
                    "targets": name,
                    "bytes_per_token": nbytes,
                    "mean_value": values_N.mean().item(),
                    "exact_mean_value": exact_N.mean().item(),
                    "mean_value_error": (values_N.mean() / exact_N.mean() - 1).item(),
                    "token_value_error": (
                        (values_N - exact_N).abs().mean() / exact_N.mean()
                    ).item(),
                    "gradient_error": ((gradient_ND - exact_ND).norm() / exact_ND.norm()).item(),
                    "gradient_cosine_median": cosine_N.median().item(),
                }
            )
    table = Table("divergence", "targets", "bytes a token", "mean", "its error", "gradient error")
    for row in rows:
        table.add_row(
            row["divergence"],
            row["targets"],
            str(row["bytes_per_token"]),
            f"{row['mean_value']:.4f}",
            f"{row['mean_value_error']:+.2%}",
            f"{row['gradient_error']:.2%}",
        )
    Console(width=100).print(table)
    print(write("teacher_targets", {"positions": arguments.positions, "rows": rows}))


if __name__ == "__main__":
    main()
