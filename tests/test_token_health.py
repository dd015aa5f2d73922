"""How student and teacher compare at a sample of the student's tokens."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from distillm_ray.config import SkewKL
from distillm_ray.loss.distillation_head import DistillationHead
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, WeightedTerm
from distillm_ray.loss.teacher_tensors import TeacherHidden, TeacherLogits, TeacherTopK
from distillm_ray.loss.token_health import (
    MAX_TOKENS,
    TokenHealth,
    sampled_positions,
    token_health,
)
from distillm_ray.models.heads import PLAIN_RULE, FrozenHead

V = 40
POSITIONS = torch.tensor([0, 2])
LABELS = torch.tensor([1, 30])


def means(health: TokenHealth) -> tuple[float, ...]:
    number, *sums = health
    return tuple(float(one) / number for one in sums)


def test_a_uniform_student_against_a_teacher_with_two_choices_in_closed_form() -> None:
    # Position 0: 3/4 on id 1 and 1/4 on id 2; position 1 is not sampled; position 2: all on id 30.
    teacher_NV = torch.full((3, V), -torch.inf)
    teacher_NV[0, 1], teacher_NV[0, 2] = math.log(0.75), math.log(0.25)
    teacher_NV[1, 5] = teacher_NV[2, 30] = 0.0
    student_SV = torch.zeros(2, V)
    entropy, teacher_entropy, _, probability = means(
        token_health(student_SV, TeacherLogits(values_NV=teacher_NV), POSITIONS, LABELS)
    )
    assert entropy == pytest.approx(math.log(V))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2
    assert teacher_entropy == pytest.approx(expected, abs=1e-6)
    assert probability == pytest.approx((0.75 + 1.0) / 2)


def test_the_overlap_is_the_share_of_the_students_most_likely_ids() -> None:
    # The student prefers ids 0 to 15; the teacher 0 to 15 at position 0, and 8 to 23 at position 2.
    student_SV = -torch.arange(V, dtype=torch.float32).expand(2, V)
    teacher_NV = torch.stack([student_SV[0], student_SV[0], student_SV[0].roll(8)])
    health = token_health(student_SV, TeacherLogits(values_NV=teacher_NV), POSITIONS, LABELS)
    assert means(health)[2] == pytest.approx((1.0 + 0.5) / 2)


def test_top_k_targets_tell_the_overlap_only() -> None:
    student_SV = -torch.arange(V, dtype=torch.float32).expand(2, V)
    ids_NK = torch.tensor([[3, 2, 1, 0], [9, 9, 9, 9], [0, 1, 38, 39]])
    log_probs_NK = torch.log(torch.tensor([0.4, 0.3, 0.1, 0.1])).expand(3, 4)
    teacher = TeacherTopK(ids_NK=ids_NK, log_probs_NK=log_probs_NK)
    entropy, teacher_entropy, overlap, probability = means(
        token_health(student_SV, teacher, POSITIONS, LABELS)
    )
    assert overlap == pytest.approx((1.0 + 0.5) / 2)
    assert math.isfinite(entropy)
    assert math.isnan(teacher_entropy) and math.isnan(probability)


def test_positions_are_spread_over_the_students_tokens() -> None:
    marked = np.zeros(1000, dtype=bool)
    assert sampled_positions(marked) is None
    marked[100:110] = True
    few = sampled_positions(marked)
    assert few is not None and few.tolist() == list(range(100, 110))
    marked[500:900] = True
    many = sampled_positions(marked)
    assert many is not None
    assert len(set(many.tolist())) == MAX_TOKENS
    assert (many[0], many[-1]) == (100, 899)
    assert marked[many].all()


@pytest.mark.parametrize("implementation", ["fused", "plain"])
def test_the_head_compares_itself_with_the_teacher_and_changes_no_loss(
    implementation: Literal["fused", "plain"],
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, V + 3)  # three rows of padding
    head = DistillationHead(
        linear, rule=PLAIN_RULE, vocabulary_size=V, implementation=implementation
    )
    hidden_ND = torch.randn(3, 8)
    teacher = TeacherHidden(
        values_ND=torch.randn(3, 4), head=FrozenHead(weight_VD=torch.randn(V, 4))
    )
    request = LossRequest(
        terms=(WeightedTerm(term=SkewKL(), weights_N=torch.ones(3)),),
        teacher=teacher,
        labels_N=torch.tensor([1, 2, 30]),
    )
    without = head(hidden_ND, request)
    seen = head(hidden_ND, replace(request, health_S=POSITIONS))
    assert isinstance(without, HeadLoss) and isinstance(seen, HeadLoss)
    assert without.health is None and seen.health is not None
    assert torch.equal(without.loss, seen.loss)
    q_SV = torch.softmax(linear(hidden_ND).detach()[POSITIONS, :V].double(), -1)
    p_SV = torch.softmax(teacher.head.logits(teacher.values_ND)[POSITIONS].double(), -1)
    entropy, teacher_entropy, _, probability = means(seen.health)
    assert entropy == pytest.approx(float(-(q_SV * q_SV.log()).sum(-1).mean()), rel=1e-5)
    assert teacher_entropy == pytest.approx(float(-(p_SV * p_SV.log()).sum(-1).mean()), rel=1e-5)
    assert probability == pytest.approx(float(p_SV[[0, 1], [1, 30]].mean()), rel=1e-5)
