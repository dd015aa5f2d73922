"""DistiLLM-2's curriculum: alphas of sequences, anchors, and the weights of the two sides.

Axes: N loss positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distillm_ray.batching import pack, plan_step
from distillm_ray.config import (
    CrossEntropy,
    LossConfig,
    PairedSchedule,
    PolicyGradient,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    Term,
)
from distillm_ray.config.files import load_config, parse_config
from distillm_ray.errors import ConfigError
from distillm_ray.learner.held_out_loss import own_text_term
from distillm_ray.learner.step_statistics import StepStatistics
from distillm_ray.learner.student_model import training_request
from distillm_ray.loss.curriculum import (
    GAP_OFFSET,
    Anchor,
    GapSum,
    anchor_gaps,
    first_anchors,
    next_anchors,
    sequence_alphas,
)
from distillm_ray.loss.divergences import skew_kl, skew_reverse_kl
from distillm_ray.loss.fused import fused_loss
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, WeightedTerm, plain_loss
from distillm_ray.loss.teacher_tensors import TeacherHidden, TeacherLogits, TeacherTensors
from distillm_ray.loss.terms import loss_at, term_names, term_weights
from distillm_ray.models.heads import PLAIN_RULE, FrozenHead
from distillm_ray.types import HiddenTargets, LearnerBatch, Rollout, Source
from tests import make

SKL = SkewKL(on="teacher", alpha=0.1, curriculum=True)
SRKL = SkewReverseKL(on="student", alpha=0.1, curriculum=True)


def gaps_and_alphas(
    term: SkewKL | SkewReverseKL,
    anchor: float | None,
    p: list[float],
    q: list[float],
    sequences: list[int] | None = None,
) -> tuple[list[float], list[float]]:
    """Of labels with these probabilities, each a sequence of its own unless `sequences` says so."""
    found = sequence_alphas(
        term,
        anchor,
        log_p_N=torch.tensor(p, dtype=torch.float64).log(),
        log_q_N=torch.tensor(q, dtype=torch.float64).log(),
        sequence_N=torch.tensor(range(len(p)) if sequences is None else sequences),
    )
    return found.gaps_N.tolist(), found.alphas_N.tolist()


# ---- the alpha of a sequence ---------------------------------------------------------------------


def test_the_gap_is_the_difference_of_geometric_means_over_the_tokens_of_a_sequence() -> None:
    """Sequences 0 and 2 of a row; 1 has no loss token. sqrt(0.9 * 0.4) = 0.6."""
    p, q, sequences = [0.9, 0.4, 0.5], [0.2, 0.2, 0.125], [0, 0, 2]
    gaps, _ = gaps_and_alphas(SKL, None, p, q, sequences)
    assert gaps == pytest.approx([0.4, 0.4, 0.375])
    gaps, _ = gaps_and_alphas(SRKL, None, p, q, sequences)
    assert gaps == pytest.approx([-0.4, -0.4, -0.375])


@pytest.mark.parametrize(
    ("gap", "alpha"),
    [
        (0.4, 0.1),  # twice the anchor: 1 - 0.9 / 2 is above the limit
        (0.2, 0.1),
        (0.19, 1 - 0.9 * 0.2 / (0.19 + GAP_OFFSET)),
        (0.185, 1 - 0.9 * 0.2 / (0.185 + GAP_OFFSET)),
        (0.15, 0.01),  # 1 - 0.9 * 4 / 3 is negative
        (0.0, 0.01),
        (-0.1, 0.1),  # the student is better: 1 + 1.8
    ],
)
def test_alpha_is_one_minus_the_anchors_share_of_the_gap_within_its_limits(
    gap: float, alpha: float
) -> None:
    assert gaps_and_alphas(SKL, 0.2, [0.5 + gap], [0.5])[1] == pytest.approx([alpha], rel=1e-4)
    assert gaps_and_alphas(SRKL, 0.2, [0.5], [0.5 + gap])[1] == pytest.approx([alpha], rel=1e-4)


@pytest.mark.parametrize("anchor", [None, 0.0, -0.3])
@pytest.mark.parametrize("gap", [-0.2, 0.0, 1e-6, 0.3])
def test_alpha_is_the_limit_without_a_positive_anchor(anchor: float | None, gap: float) -> None:
    assert gaps_and_alphas(SKL, anchor, [0.5 + gap], [0.5])[1] == [0.1]


@pytest.mark.parametrize(("p", "q"), [(0.0, 0.5), (0.5, 0.0), (0.0, 0.0), (math.nan, 0.5)])
def test_a_sequence_with_an_impossible_label_keeps_the_limit_and_has_no_gap(
    p: float, q: float
) -> None:
    """The other sequence of the row has the gap 0.01 and the lowest alpha."""
    gaps, alphas = gaps_and_alphas(SKL, 0.2, [0.5, p, 0.51], [0.5, q, 0.5], [0, 0, 1])
    assert [math.isnan(gap) for gap in gaps] == [True, True, False]
    assert alphas == [0.1, 0.1, 0.01]


def test_a_row_without_a_loss_token_has_no_alphas() -> None:
    assert gaps_and_alphas(SKL, 0.2, [], [], []) == ([], [])


# ---- the loss ------------------------------------------------------------------------------------

N, V, D, TEACHER_D = 17, 29, 5, 6
SEQUENCES = torch.tensor([0] * 4 + [1] * 2 + [3] * 7 + [4] * 4)
ANCHORS = (0.02, 0.03)  # the random gaps lie on both sides of them


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HIDDEN, HEAD = normal(N, D, seed=0), normal(V, D, seed=1)
TEACHER_HIDDEN, TEACHER_HEAD = normal(N, TEACHER_D, seed=2), normal(V, TEACHER_D, seed=3)
LABELS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(4))
WEIGHTS = (normal(N, seed=5).abs(), normal(N, seed=6).abs())


def run(
    compute: Any, teacher: TeacherTensors, terms: tuple[Term, ...], dtype: torch.dtype
) -> tuple[HeadLoss, Tensor, Tensor]:
    """The result, and the gradients of hidden states and head."""
    hidden_ND, weight_VD = (one.to(dtype, copy=True).requires_grad_() for one in (HIDDEN, HEAD))
    request = LossRequest(
        terms=tuple(
            WeightedTerm(term=term, weights_N=weights_N.to(dtype), anchor=anchor)
            for term, weights_N, anchor in zip(terms, WEIGHTS, ANCHORS, strict=True)
        ),
        teacher=teacher,
        labels_N=LABELS,
        sequence_N=SEQUENCES,
    )
    result = compute(
        hidden_ND, weight_VD, None, rule=PLAIN_RULE, vocabulary_size=V, request=request
    )
    hidden_gradient_ND, weight_gradient_VD = torch.autograd.grad(
        result.loss, (hidden_ND, weight_VD)
    )
    return result, hidden_gradient_ND, weight_gradient_VD


def teacher_of(kind: str, dtype: torch.dtype) -> TeacherTensors:
    head = FrozenHead(weight_VD=TEACHER_HEAD.to(dtype))
    hidden_ND = TEACHER_HIDDEN.to(dtype)
    if kind == "hidden":
        return TeacherHidden(values_ND=hidden_ND, head=head)
    return TeacherLogits(values_NV=head.logits(hidden_ND))


def reference() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Alphas, values and gradients: every sequence for itself, with a constant of its own."""
    hidden_ND, weight_VD = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()
    student_NV = hidden_ND @ weight_VD.T
    teacher_NV = TEACHER_HIDDEN @ TEACHER_HEAD.T
    loss = torch.zeros((), dtype=torch.float64)
    all_alphas: list[Tensor] = []
    all_values: list[Tensor] = []
    for divergence, sign, weights_N, anchor in zip(
        (skew_kl, skew_reverse_kl), (1, -1), WEIGHTS, ANCHORS, strict=True
    ):
        values_N, alphas_N = torch.zeros(N, dtype=torch.float64), torch.zeros(N)
        for sequence in SEQUENCES.unique():
            [rows] = torch.where(sequence == SEQUENCES)
            p, q = (
                math.exp(-torch.nn.functional.cross_entropy(logits[rows], LABELS[rows]).item())
                for logits in (teacher_NV, student_NV)
            )
            alpha = 1 - 0.9 * anchor / (sign * (p - q) + 1e-5)
            alpha = min(max(alpha, 0.01), 0.1)
            values = divergence(student_NV[rows], teacher_NV[rows], alpha)
            loss = loss + (weights_N[rows] * values).sum()
            values_N[rows], alphas_N[rows] = values.detach(), alpha
        all_alphas.append(alphas_N)
        all_values.append(values_N)
    hidden_gradient_ND, weight_gradient_VD = torch.autograd.grad(loss, (hidden_ND, weight_VD))
    return all_alphas, all_values, hidden_gradient_ND, weight_gradient_VD


@pytest.mark.parametrize("kind", ["hidden", "logits"])
@pytest.mark.parametrize("tokens", [None, 1, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_plain_and_fused_loss_are_the_divergences_with_each_sequences_own_alpha(
    kind: str, tokens: int | None, dtype: torch.dtype
) -> None:
    """In values and gradients: none flows through alpha. `tokens` None is the plain loss."""
    compute = plain_loss
    if tokens is not None:
        bytes_per_logit = torch.empty(0, dtype=dtype).element_size()
        compute = partial(fused_loss, memory_bytes=2 * V * bytes_per_logit * tokens)
    result, *gradients = run(compute, teacher_of(kind, dtype), (SKL, SRKL), dtype)
    alphas, values, *expected = reference()
    close = partial(torch.testing.assert_close, check_dtype=False, rtol=1e-4, atol=1e-5)
    if dtype == torch.float64:
        close = partial(close, rtol=1e-7, atol=1e-9)
    for index, found in enumerate(result.alphas):
        assert found is not None
        torch.testing.assert_close(
            found.alphas_N, alphas[index], check_dtype=False, rtol=1e-4, atol=1e-5
        )
        assert len(alphas[index].unique()) > 1, "the sequences have different alphas"
        close(result.values[index], values[index])
    for gradient, wanted in zip(gradients, expected, strict=True):
        close(gradient, wanted)


def test_before_the_anchor_a_curriculum_is_the_divergence_at_the_limit() -> None:
    teacher = teacher_of("hidden", torch.float64)
    request = LossRequest(
        terms=(WeightedTerm(term=SKL, weights_N=WEIGHTS[0]),),
        teacher=teacher,
        labels_N=LABELS,
        sequence_N=SEQUENCES,
    )
    hidden_ND = HIDDEN.clone().requires_grad_()
    found = fused_loss(hidden_ND, HEAD, None, rule=PLAIN_RULE, vocabulary_size=V, request=request)
    constant_ND = HIDDEN.clone().requires_grad_()
    values_N = skew_kl(constant_ND @ HEAD.T, TEACHER_HIDDEN @ TEACHER_HEAD.T, 0.1)
    torch.testing.assert_close(found.values[0], values_N.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, hidden_ND),
        torch.autograd.grad((WEIGHTS[0] * values_N).sum(), constant_ND),
        rtol=1e-12,
        atol=1e-14,
    )


def test_only_a_curriculum_asks_for_one_more_pass() -> None:
    def needs_samples(term: Term) -> bool:
        return LossRequest(
            terms=(WeightedTerm(term=term, weights_N=WEIGHTS[0]),),
            teacher=teacher_of("logits", torch.float32),
            labels_N=LABELS,
        ).needs_samples

    assert needs_samples(SKL) and needs_samples(SRKL)
    assert not needs_samples(SkewKL(min_alpha=0.05, final_weight=0.5))
    assert not needs_samples(SkewReverseKL())


def test_the_held_out_divergence_has_a_constant_alpha() -> None:
    assert own_text_term(LossConfig(terms=(SKL, SRKL))) == SkewReverseKL(alpha=0.1)
    assert own_text_term(LossConfig(terms=(ReverseKL(),))) == ReverseKL()


# ---- the anchor ----------------------------------------------------------------------------------


def rollouts(step: int) -> list[Rollout]:
    """Six pairs of the teacher's and the student's response."""
    rng = np.random.default_rng(step)
    return [
        make.rollout(
            f"{step}-{index}",
            prompt=rng.integers(0, V, 2),
            response=rng.integers(0, V, 1 + index % 5),
            source=Source.TEACHER if index % 2 else Source.STUDENT,
            ordinal=None if index % 2 else index,
        )
        for index in range(12)
    ]


def packed(step: int, loss: LossConfig, num_ranks: int) -> list[list[LearnerBatch]]:
    drawn = rollouts(step)
    targets = {}
    for index, one in enumerate(drawn):
        hidden_TD = normal(one.num_loss_tokens, TEACHER_D, seed=100 * step + index).float()
        targets[one.rollout_id] = HiddenTargets(values_TD=hidden_TD.numpy())
    plan = plan_step(make.draw(drawn), num_ranks=num_ranks, max_micro_batch_tokens=8, loss=loss)
    return [[pack(row, targets) for row in rank] for rank in plan.ranks]


def statistics_of(
    batches: list[LearnerBatch], loss: LossConfig, anchors: tuple[Anchor, ...]
) -> StepStatistics:
    """Of a student whose hidden state depends on the label only."""
    cpu = torch.device("cpu")
    statistics = StepStatistics(loss.terms, cpu)
    head = FrozenHead(weight_VD=TEACHER_HEAD.float())
    for batch in batches:
        request = training_request(batch, loss, head, cpu, anchors=anchors)
        hidden_ND = normal(V, D, seed=8).float()[torch.from_numpy(batch.labels_N).long()]
        result = fused_loss(
            hidden_ND, HEAD.float(), None, rule=PLAIN_RULE, vocabulary_size=V, request=request
        )
        statistics.add(batch, result)
    return statistics


@pytest.mark.parametrize("num_ranks", [2, 13])
def test_the_anchor_over_some_ranks_is_that_of_one(num_ranks: int) -> None:
    """An all-reduce adds the sums of the ranks. With more ranks than sequences one has a filler."""
    terms = tuple(one.model_copy(update={"anchor_steps": 2}) for one in (SKL, SRKL))
    loss = LossConfig(terms=(terms[0], CrossEntropy(on="teacher"), terms[1]))
    alone = together = first_anchors(loss.terms)
    for step in range(3):
        [batches] = packed(step, loss, 1)
        whole = statistics_of(batches, loss, alone)
        record = whole.reduce(step, wait_seconds=0.0)
        ranks = packed(step, loss, num_ranks)
        assert any(any(batch.is_filler) for rank in ranks for batch in rank) == (num_ranks == 13)
        parts = [statistics_of(rank, loss, together) for rank in ranks]
        for part in parts:
            part.reduce(step, wait_seconds=0.0)
        summed = tuple(
            GapSum(
                gaps=sum(one.gaps for one in of_term),
                alphas=sum(one.alphas for one in of_term),
                num_sequences=sum(one.num_sequences for one in of_term),
            )
            for of_term in zip(*(part.gaps for part in parts), strict=True)
        )
        assert [one.num_sequences for one in whole.gaps] == [6, 0, 6]
        assert [one.num_sequences for one in summed] == [6, 0, 6]
        for one, other in zip(whole.gaps, summed, strict=True):
            assert (one.gaps, one.alphas) == pytest.approx((other.gaps, other.alphas), rel=1e-5)
        means = [one.alphas / 6 for one in (whole.gaps[0], whole.gaps[2])]
        assert list(record.alpha_by_term) == ["skew_kl on teacher", "skew_reverse_kl on student"]
        assert list(record.alpha_by_term.values()) == pytest.approx(means)
        if step < 2:
            assert anchor_gaps(alone, loss.terms) == (None, None, None)
            assert means == pytest.approx([0.1, 0.1])
        alone = next_anchors(alone, loss.terms, whole.gaps)
        together = next_anchors(together, loss.terms, summed)
    assert [one.num_steps for one in alone] == [2, 0, 2]
    first, nothing, last = anchor_gaps(alone, loss.terms)
    assert nothing is None
    assert (first, last) == pytest.approx(anchor_gaps(together, loss.terms)[::2], rel=1e-5)


def test_the_window_counts_the_steps_in_which_a_term_has_a_sequence() -> None:
    term = SkewKL(curriculum=True, anchor_steps=2)
    anchor = Anchor()
    assert anchor.plus(GapSum(), term) == anchor
    anchor = anchor.plus(GapSum(gaps=0.75, num_sequences=3), term)
    assert anchor.gap(term) is None
    anchor = anchor.plus(GapSum(), term).plus(GapSum(gaps=0.05, num_sequences=1), term)
    assert anchor.gap(term) == pytest.approx(0.2)
    assert anchor.plus(GapSum(gaps=100.0, num_sequences=1), term) == anchor


# ---- the weights of the two sides ----------------------------------------------------------------

SIDES = LossConfig(
    terms=(
        SKL.model_copy(update={"final_weight": 0.5}),
        SRKL.model_copy(update={"final_weight": 1.5}),
    )
)


@pytest.mark.parametrize(
    ("step", "teacher", "student"),
    [(0, 1.0, 1.0), (25, 0.75, 1.25), (50, 0.5, 1.5), (75, 0.5, 1.5), (99, 0.5, 1.5)],
)
def test_weight_moves_to_the_students_side_over_the_first_half_of_the_run(
    step: int, teacher: float, student: float
) -> None:
    """Half of the slots is the teacher's: its tokens weigh 1/2 in sum before the term's weight."""
    loss = loss_at(SIDES, step, num_steps=100)
    assert [term.weight for term in loss.terms] == [teacher, student]
    weights = term_weights(rollouts(0), loss)
    sums = [sum(float(one[term].sum()) for one in weights) for term in (0, 1)]
    assert sums == pytest.approx([teacher / 2, student / 2])


def test_other_weights_of_a_loss_stay_and_a_loss_without_a_ramp_is_itself() -> None:
    loss = LossConfig(terms=(SkewKL(weight=2.0, final_weight=4.0), CrossEntropy(weight=0.3)))
    halfway = loss_at(loss, 3, num_steps=12).terms
    assert [term.weight for term in halfway] == pytest.approx([3.0, 0.3])
    still = LossConfig(terms=(SkewKL(weight=2.0), CrossEntropy(weight=0.3)))
    assert loss_at(still, 3, num_steps=12) is still


def test_the_ramp_follows_the_number_of_steps_that_a_resumed_run_has() -> None:
    assert loss_at(SIDES, 25, num_steps=200).terms[0].weight == pytest.approx(0.875)


# ---- the config ----------------------------------------------------------------------------------


def refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(make.tree(**sections), name="x.yaml")
    return str(caught.value).removeprefix("x.yaml:\n").strip()


def test_the_lower_limit_of_a_curriculums_alpha_is_below_the_upper_one() -> None:
    term = {"type": "skew_kl", "alpha": 0.05, "min_alpha": 0.1}
    said = refusal(loss={"terms": [{**term, "curriculum": True}]})
    assert said == (
        "loss.terms.0: min_alpha must be below alpha, got 0.1 >= 0.05: the curriculum lowers alpha"
        " to min_alpha; lower min_alpha or raise alpha"
    )
    assert make.config(loss={"terms": [term]}).loss.terms[0].type == "skew_kl"
    equal = {**term, "alpha": 0.1, "curriculum": True}
    assert "got 0.1 >= 0.1" in refusal(loss={"terms": [equal]})  # it could not move


def test_a_curriculum_needs_the_teachers_probability_of_every_label() -> None:
    said = refusal(
        loss={"terms": [{"type": "reverse_kl"}, {"type": "skew_kl", "curriculum": True}]},
        targets={"type": "top_k"},
    )
    assert said == (
        "targets.type must be hidden or logits with loss.terms.1.curriculum=true, got top_k: the"
        " teacher's probability of a token outside of the k ids is not known; set"
        " loss.terms.1.curriculum=false"
    )
    assert make.config(targets={"type": "top_k"}).targets.type == "top_k"


@pytest.mark.parametrize("value", [0, -1, True])
def test_a_final_weight_is_positive(value: Any) -> None:
    said = refusal(loss={"terms": [{"type": "cross_entropy", "final_weight": value}]})
    assert said.startswith("loss.terms.0.final_weight:")


def test_terms_that_differ_in_their_ramp_only_are_one_term() -> None:
    said = refusal(loss={"terms": [{"type": "skew_kl"}, {"type": "skew_kl", "final_weight": 2}]})
    assert "loss.terms must differ in type, parameters or on" in said


def test_a_term_with_a_curriculum_and_one_without_are_two_terms_with_two_names() -> None:
    terms = (SkewKL(), SkewKL(curriculum=True, final_weight=0.5))
    assert LossConfig(terms=terms).terms == terms
    assert term_names(terms) == (
        "skew_kl(alpha=0.1) on all",
        "skew_kl(alpha=0.1, curriculum=True, min_alpha=0.01, anchor_steps=10) on all",
    )


def test_every_type_of_term_may_have_a_final_weight() -> None:
    for term in (CrossEntropy(final_weight=2.0), PolicyGradient(final_weight=2.0)):
        assert loss_at(LossConfig(terms=(term,)), 9, num_steps=10).terms[0].weight == 2.0


def test_the_form_of_the_released_code_is_one_override_away() -> None:
    """As docs/methods.md and the method's file write it."""
    released = "loss.terms=[{on: teacher, type: skew_kl}, {on: student, type: skew_reverse_kl}]"
    root = Path(__file__).parent.parent
    for text in ("docs/methods.md", "configs/methods/distillm2.yaml"):
        assert released in (root / text).read_text()
    config = load_config(root / "configs" / "methods" / "distillm2.yaml", [released])
    assert config.loss.terms == (SkewKL(on="teacher"), SkewReverseKL(on="student"))
    assert config.schedule == PairedSchedule()
