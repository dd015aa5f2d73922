"""The policy gradient against the divergence that it estimates, and the walk against autograd.

Axes: N loss positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distillm_ray.config import CrossEntropy, ForwardKL, PolicyGradient, ReverseKL, Term
from distillm_ray.config.files import parse_config
from distillm_ray.config.remarks import remarks_on
from distillm_ray.errors import ConfigError
from distillm_ray.loss.divergences import reverse_kl
from distillm_ray.loss.fused import fused_loss
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, WeightedTerm, plain_loss
from distillm_ray.loss.policy_gradient import SampledTokens, advantages, surrogate
from distillm_ray.loss.teacher_tensors import TeacherHidden, TeacherLogits, TeacherTensors
from distillm_ray.methods import METHODS
from distillm_ray.models.heads import PLAIN_RULE, FrozenHead
from distillm_ray.models.logit_rules import LogitRule
from tests import make

V, D = 7, 5
EYE = torch.eye(V, dtype=torch.float64)
Horizon = Literal["token", "rest"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(
    logits_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor,
    *terms: Term,
    weights_N: Tensor | None = None,
    behaviour_N: Tensor | None = None,
    sequence_N: Tensor | None = None,
    implementation: Literal["fused", "plain"] = "fused",
) -> HeadLoss:
    """The loss of logits: hidden states with the identity as their head."""
    weights_N = torch.ones(len(logits_NV), dtype=torch.float64) if weights_N is None else weights_N
    compute = fused_loss if implementation == "fused" else plain_loss
    return compute(
        logits_NV,
        EYE,
        None,
        rule=PLAIN_RULE,
        vocabulary_size=V,
        request=LossRequest(
            terms=tuple(WeightedTerm(term=term, weights_N=weights_N) for term in terms),
            teacher=TeacherLogits(values_NV=teacher_NV),
            labels_N=labels_N,
            behaviour_N=behaviour_N,
            sequence_N=sequence_N,
        ),
    )


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, of)
    return found


def test_its_mean_over_the_students_samples_is_the_gradient_of_the_reverse_kl() -> None:
    """Every id once, weighted by the student's probability of it."""
    student_V, teacher_V = normal(V, seed=1), normal(V, seed=2)
    logits_NV = student_V.repeat(V, 1).requires_grad_()
    q_V = student_V.softmax(-1)
    result = loss_of(
        logits_NV, teacher_V.repeat(V, 1), torch.arange(V), PolicyGradient(), weights_N=q_V
    )
    exact_1V = student_V[None].clone().requires_grad_()
    divergence = reverse_kl(exact_1V, teacher_V[None]).sum()
    torch.testing.assert_close(result.loss, divergence.detach())
    torch.testing.assert_close(
        gradient(result.loss, logits_NV).sum(0), gradient(divergence, exact_1V)[0]
    )


def test_single_step_and_long_part_are_the_gradient_of_the_sequences_reverse_kl() -> None:
    """All sequences of two tokens. The long part of the first token is the second's reward."""
    student_VV, teacher_VV = normal(V + 1, V, seed=3), normal(V + 1, V, seed=4)

    def log_of(table: Tensor, first: Tensor, second: Tensor) -> Tensor:
        log_VV = table.log_softmax(-1)
        return log_VV[V, first] + log_VV[first, second]

    first, second = torch.tensor(list(itertools.product(range(V), repeat=2))).T
    table = student_VV.clone().requires_grad_()
    log_q, log_p = log_of(table, first, second), log_of(teacher_VV, first, second)
    exact = gradient((log_q.exp() * (log_q - log_p)).sum(), table)

    probabilities = log_of(student_VV, first, second).exp()
    # Each sequence has two rows: the logits before its first token and before its second.
    rows = torch.stack([torch.full_like(first, V), first], 1).flatten()
    labels_N = torch.stack([first, second], 1).flatten()
    table = student_VV.clone().requires_grad_()
    result = loss_of(
        table[rows],
        teacher_VV[rows],
        labels_N,
        ReverseKL(on="student"),
        PolicyGradient(horizon="rest"),
        weights_N=probabilities.repeat_interleave(2),
        sequence_N=torch.arange(len(first)).repeat_interleave(2),
    )
    torch.testing.assert_close(gradient(result.loss, table), exact)


@pytest.mark.parametrize("horizon", ["token", "rest"])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(horizon: Horizon) -> None:
    logits_NV = normal(9, V).requires_grad_()
    term = PolicyGradient(horizon=horizon)
    result = loss_of(logits_NV, logits_NV.detach(), torch.arange(9) % V, term)
    assert result.loss.item() == 0.0
    assert gradient(result.loss, logits_NV).abs().max() == 0.0


def test_the_rest_is_the_mean_of_the_later_rewards_of_the_same_sequence() -> None:
    log_p_N = torch.tensor([-1.0, -3.0, -2.0, -torch.inf, -5.0, -4.0, -9.0])
    tokens = SampledTokens(
        log_p_N=log_p_N,
        log_q_N=torch.full((7,), -1.0),
        behaviour_N=None,
        sequence_N=torch.tensor([0, 0, 0, 1, 1, 1, 2]),
    )
    # Rewards 0, -2, -1 | -inf, -4, -3 | -8.
    rest = advantages(PolicyGradient(horizon="rest"), tokens)
    assert rest.tolist() == [-1.5, -1.0, 0.0, -3.5, -3.0, 0.0, 0.0]
    own = advantages(PolicyGradient(), tokens)
    assert own.tolist() == [0.0, -2.0, -1.0, -torch.inf, -4.0, -3.0, -8.0]


def test_the_ratio_to_the_sampling_student_is_clipped_as_in_ppo() -> None:
    ratios = torch.tensor([0.5, 0.9, 1.0, 1.1, 2.0, 0.5, 0.9, 1.0, 1.1, 2.0])
    signs = torch.tensor([1.0] * 5 + [-1.0] * 5)
    values, slopes = surrogate(PolicyGradient(clip=0.2), ratios.log(), signs)
    expected = [-0.5, -0.9, -1.0, -1.1, -1.2, 0.8, 0.9, 1.0, 1.1, 2.0]
    torch.testing.assert_close(values, torch.tensor(expected))
    # Where moving further away would still count, the slope is -r A.
    expected = [-0.5, -0.9, -1.0, -1.1, 0.0, 0.0, 0.9, 1.0, 1.1, 2.0]
    torch.testing.assert_close(slopes, torch.tensor(expected))


def reference(
    logits_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor,
    behaviour_N: Tensor,
    sequence_N: Tensor,
    term: PolicyGradient,
) -> Tensor:
    """[N], token by token, with autograd through the ratio."""
    log_q_NV, log_p_NV = logits_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    values = []
    for index, label in enumerate(labels_N.tolist()):
        log_q = log_q_NV[index, label]
        behaviour = behaviour_N[index]
        ratio = (log_q - (log_q.detach() if behaviour.isnan() else behaviour)).exp()
        if term.horizon == "token":
            advantage = (log_p_NV[index, label] - log_q).detach()
        else:
            later = [
                (log_p_NV[one, labels_N[one]] - log_q_NV[one, labels_N[one]]).detach()
                for one in range(index + 1, len(labels_N))
                if sequence_N[one] == sequence_N[index]
            ]
            advantage = torch.stack(later).mean() if later else torch.zeros((), dtype=torch.float64)
        clipped = ratio.clamp(1 - term.clip, 1 + term.clip)
        values.append(-torch.minimum(ratio * advantage, clipped * advantage))
    return torch.stack(values)


@pytest.mark.parametrize("implementation", ["fused", "plain"])
@pytest.mark.parametrize("horizon", ["token", "rest"])
def test_values_and_gradients_are_those_of_the_formula(
    implementation: Literal["fused", "plain"], horizon: Horizon
) -> None:
    num = 23
    logits_NV = normal(num, V, seed=5).requires_grad_()
    teacher_NV, weights_N = normal(num, V, seed=6), normal(num, seed=7).abs()
    labels_N = torch.arange(num) * 3 % V
    behaviour_N = logits_NV.detach().log_softmax(-1)[torch.arange(num), labels_N]
    behaviour_N = behaviour_N + 0.4 * normal(num, seed=8)
    behaviour_N[::5] = torch.nan
    sequence_N = torch.arange(num) // 6
    term = PolicyGradient(horizon=horizon, clip=0.3)
    values_N = reference(logits_NV, teacher_NV, labels_N, behaviour_N, sequence_N, term)
    expected = gradient((weights_N * values_N).sum(), logits_NV)
    result = loss_of(
        logits_NV,
        teacher_NV,
        labels_N,
        term,
        weights_N=weights_N,
        behaviour_N=behaviour_N,
        sequence_N=sequence_N,
        implementation=implementation,
    )
    torch.testing.assert_close(result.values[0], values_N.detach())
    torch.testing.assert_close(gradient(result.loss, logits_NV), expected)


def test_the_fused_walk_equals_the_plain_one_beside_other_terms_and_with_real_heads() -> None:
    num, rule = 31, LogitRule(soft_cap=5.0)
    hidden_ND, weight_VD = normal(num, D, seed=1), normal(V + 2, D, seed=2)
    head = FrozenHead(weight_VD=normal(V, D, seed=3), bias_V=normal(V, seed=4), rule=rule)
    teacher: TeacherTensors = TeacherHidden(values_ND=normal(num, D, seed=5), head=head)
    terms: tuple[Term, ...] = (
        ReverseKL(on="student", max_importance=1.5),
        PolicyGradient(horizon="rest", max_importance=1.1),
        CrossEntropy(),
        PolicyGradient(clip=0.1),
        ForwardKL(),
    )
    request = LossRequest(
        terms=tuple(
            WeightedTerm(term=term, weights_N=normal(num, seed=10 + index).abs())
            for index, term in enumerate(terms)
        ),
        teacher=teacher,
        labels_N=torch.arange(num) % V,
        behaviour_N=-normal(num, seed=6).abs() - 1.0,
        sequence_N=torch.arange(num) // 4,
    )
    found = []
    for compute in (plain_loss, fused_loss):
        hidden = hidden_ND.clone().requires_grad_()
        weight = weight_VD.clone().requires_grad_()
        options = {"memory_bytes": 5 * 8 * V} if compute is fused_loss else {}
        result = compute(
            hidden, weight, None, rule=rule, vocabulary_size=V, request=request, **options
        )
        result.loss.backward()
        found.append((result.loss.detach(), result.losses_M, hidden.grad, weight.grad))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain)


def test_importance_weighs_a_divergence_by_the_bounded_ratio() -> None:
    logits_NV, teacher_NV = normal(4, V, seed=1), normal(4, V, seed=2)
    labels_N = torch.arange(4)
    log_q_N = logits_NV.log_softmax(-1)[torch.arange(4), labels_N]
    ratios = torch.tensor([0.5, 1.0, 3.0, 1.0], dtype=torch.float64)
    behaviour_N = log_q_N - ratios.log()
    behaviour_N[3] = torch.nan
    term = ReverseKL(on="student", max_importance=2.0)
    result = loss_of(logits_NV, teacher_NV, labels_N, term, behaviour_N=behaviour_N)
    plain_N = reverse_kl(logits_NV, teacher_NV)
    expected = (plain_N * torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64)).sum()
    torch.testing.assert_close(result.loss, expected)


def test_a_token_that_the_teacher_excludes_is_counted_and_teaches_nothing() -> None:
    logits_NV, teacher_NV = normal(3, V, seed=1).requires_grad_(), normal(3, V, seed=2)
    teacher_NV[1, 4] = -torch.inf
    result = loss_of(logits_NV, teacher_NV, torch.tensor([0, 4, 2]), PolicyGradient())
    assert result.values[0][1] == torch.inf
    assert int(result.num_infinite) == 1
    assert result.loss.isfinite()
    assert gradient(result.loss, logits_NV)[1].abs().max() == 0.0


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_samples_of_a_mixture_with_the_teacher_have_the_expectation_of_the_students(
    share: float,
) -> None:
    """Every id once, weighted by b = m p + (1 - m) q; the ratio q / b is at most 1 / (1 - m)."""
    student_V, teacher_V = normal(V, seed=1), normal(V, seed=2)
    b_V = share * teacher_V.softmax(-1) + (1 - share) * student_V.softmax(-1)
    assert (student_V.softmax(-1) / b_V).max() < 1 / (1 - share)

    def expectation(term: Term) -> tuple[Tensor, Tensor]:
        logits_NV = student_V.repeat(V, 1).requires_grad_()
        result = loss_of(
            logits_NV,
            teacher_V.repeat(V, 1),
            torch.arange(V),
            term,
            weights_N=b_V,
            behaviour_N=b_V.log(),
        )
        return result.loss, gradient(result.loss, logits_NV).sum(0)

    exact_1V = student_V[None].clone().requires_grad_()
    divergence = reverse_kl(exact_1V, teacher_V[None]).sum()
    exact = (divergence.detach(), gradient(divergence, exact_1V)[0])
    unbounded = PolicyGradient(clip=0.999), ReverseKL(on="student", max_importance=2.0)
    for term in unbounded:
        for found, expected in zip(expectation(term), exact, strict=True):
            torch.testing.assert_close(found, expected)
    biased, _ = expectation(ReverseKL(on="student", max_importance=1.0))
    assert biased < exact[0]


def test_samples_of_another_distribution_than_the_students_are_remarked() -> None:
    schedule = {"type": "fixed", "phi": 1.0, "replay_ratio": "none"}
    terms = [{"type": "reverse_kl", "on": "student"}, {"type": "policy_gradient"}]

    def remarks(terms: list[dict[str, str]], **sampling: float) -> tuple[str, ...]:
        tree = make.tree(loss={"terms": terms}, schedule=schedule, rollout={"sampling": sampling})
        return remarks_on(parse_config(tree, name="x"))

    assert remarks(terms) == ()
    assert remarks(terms[:1], temperature=0.5) == ()
    for sampling in ({"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}):
        (remark,) = remarks(terms, **sampling)
        assert remark.startswith("warning: rollout.sampling changes the distribution")


def test_terms_that_take_a_mixtures_samples_for_the_students_are_remarked() -> None:
    def remarks(method: str, mix: float = 0.2, **sections: Any) -> tuple[str, ...]:
        rollout = {"engine": {"type": "transformers"}, "teacher_mix": mix}
        tree = make.tree(**{**METHODS[method], "rollout": rollout, **sections})
        return remarks_on(parse_config(tree, name="x"))

    assert remarks("minillm") == ()
    assert remarks("opd", mix=0.0) == ()
    (idle,) = remarks("kd")
    assert idle.startswith("warning: rollout.teacher_mix has no effect"), "nothing is sampled"
    (remark,) = remarks("opd")
    assert remark.startswith("warning: rollout.teacher_mix = 0.2 samples responses from a mixture")
    assert "loss.terms.0 (reverse_kl on student) without importance weights" in remark
    weighted = {"terms": [{"type": "reverse_kl", "on": "student", "max_importance": 1.2}]}
    assert remarks("opd", loss=weighted) == ()


def test_configs_that_cannot_reward_samples_are_refused() -> None:
    with pytest.raises(ValidationError, match="on must be student with type: policy_gradient"):
        PolicyGradient(on="dataset")
    terms = [{"type": "policy_gradient"}]
    schedule = {"type": "fixed", "phi": 1.0, "replay_ratio": "none"}
    tree = make.tree(loss={"terms": terms}, schedule=schedule, targets={"type": "top_k"})
    with pytest.raises(ConfigError, match=r"targets\.type must be hidden or logits"):
        parse_config(tree, name="x")
    tree = make.tree(loss={"terms": [{"type": "reverse_kl", "max_importance": 2.0}]})
    with pytest.raises(ConfigError, match=r"loss\.terms\.0\.max_importance needs on: student"):
        parse_config(tree, name="x")
