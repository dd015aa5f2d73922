"""Divergences against float64 closed forms, the paper's gradients, and at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from distillm_ray.loss.divergences import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)

Divergence = Callable[[Tensor, Tensor], Tensor]
Array = NDArray[np.float64]

INFINITY = math.inf


def kl(p: Array, q: Array) -> Array:
    """KL in float64 from probabilities; 0 log 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return terms.sum(-1)


def adaptive(p: Array, q: Array, mu: float) -> Array:
    """Row by row, with a sort."""
    values = []
    for p_V, q_V in zip(p, q, strict=True):
        order = np.argsort(-p_V, kind="stable")
        in_head = np.cumsum(p_V[order]) <= mu
        in_head[0] = True
        gap = np.abs(p_V - q_V)[order]
        head, tail = gap[in_head].sum(), gap[~in_head].sum()
        share = head / (head + tail) if head + tail > 0 else 0.5
        values.append(share * kl(p_V, q_V) + (1 - share) * kl(q_V, p_V))
    return np.array(values)


CLOSED_FORMS: dict[str, tuple[Divergence, Callable[[Array, Array], Array]]] = {
    "forward_kl": (forward_kl, kl),
    "reverse_kl": (reverse_kl, lambda p, q: kl(q, p)),
    "jensen_shannon(0.3)": (
        partial(jensen_shannon, beta=0.3),
        lambda p, q: 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q),
    ),
    "skew_kl(0.1)": (partial(skew_kl, alpha=0.1), lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "skew_kl(0.7)": (partial(skew_kl, alpha=0.7), lambda p, q: kl(p, 0.7 * p + 0.3 * q)),
    "skew_reverse_kl(0.1)": (
        partial(skew_reverse_kl, alpha=0.1),
        lambda p, q: kl(q, 0.9 * p + 0.1 * q),
    ),
    "total_variation": (total_variation, lambda p, q: 0.5 * np.abs(p - q).sum(-1)),
    "adaptive_kl(0.5)": (adaptive_kl, lambda p, q: adaptive(p, q, 0.5)),
    "adaptive_kl(0.9)": (partial(adaptive_kl, mu=0.9), lambda p, q: adaptive(p, q, 0.9)),
}
DIVERGENCES = {name: function for name, (function, _) in CLOSED_FORMS.items()}
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def logits(
    *shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normal logits."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def gradient(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of the sum of values with respect to the student's logits."""
    student = student.detach().clone().requires_grad_()
    divergence(student, teacher).sum().backward()
    assert student.grad is not None
    return student.grad


def probabilities(logits_TV: Tensor) -> Array:
    """Softmax in float64."""
    return torch.softmax(logits_TV.double(), -1).numpy()


# ---- against closed forms ----------------------------------------------------------------------


@every_divergence
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_values_equal_the_float64_closed_form(name: str, scale: float) -> None:
    function, closed_form = CLOSED_FORMS[name]
    student, teacher = logits(20, 501, scale=scale, seed=1), logits(20, 501, scale=scale, seed=2)
    values_T = function(student, teacher)
    assert values_T.dtype == torch.float32
    expected_T = closed_form(probabilities(teacher), probabilities(student))
    np.testing.assert_allclose(values_T.numpy(), expected_T, rtol=2e-5, atol=5e-7)


@every_divergence
def test_gradients_pass_gradcheck_in_float64(name: str) -> None:
    student = logits(4, 9, scale=2.0, seed=3, dtype=torch.float64).requires_grad_()
    teacher = logits(4, 9, scale=2.0, seed=4, dtype=torch.float64)
    if name.startswith("adaptive_kl"):
        # Its weights are detached by definition: compare with weights held constant instead.
        mu = 0.9 if "0.9" in name else 0.5
        p, q = probabilities(teacher), probabilities(student.detach())
        share_T = np.array(
            [
                (adaptive(p[i : i + 1], q[i : i + 1], mu)[0] - kl(q[i], p[i]))
                / (kl(p[i], q[i]) - kl(q[i], p[i]))
                for i in range(4)
            ]
        )
        share = torch.from_numpy(share_T)

        def constant_weights(logits_TV: Tensor) -> Tensor:
            forward, reverse = forward_kl(logits_TV, teacher), reverse_kl(logits_TV, teacher)
            return share * forward + (1 - share) * reverse

        expected = gradient(lambda s, _: constant_weights(s), student, teacher)
        actual = gradient(DIVERGENCES[name], student, teacher)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    else:
        assert torch.autograd.gradcheck(lambda s: DIVERGENCES[name](s, teacher), (student,))


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.9])
def test_skewed_gradients_have_the_coefficients_of_the_paper(alpha: float) -> None:
    student, teacher = logits(8, 40, scale=3.0, seed=5), logits(8, 40, scale=3.0, seed=6)
    p, q = probabilities(teacher), probabilities(student)
    student_side = alpha * p + (1 - alpha) * q
    teacher_side = (1 - alpha) * p + alpha * q
    coefficients: list[tuple[Divergence, Array]] = [
        (partial(skew_kl, alpha=alpha), -(1 - alpha) * p / student_side),
        (
            partial(skew_reverse_kl, alpha=alpha),
            np.log(q / teacher_side) + 1 - alpha * q / teacher_side,
        ),
    ]
    for divergence, g in coefficients:
        expected = q * (g - (q * g).sum(-1, keepdims=True))
        actual = gradient(divergence, student, teacher).numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


def test_skew_kl_bounds_the_gradient_coefficient_by_one_over_alpha() -> None:
    student, teacher = logits(50, 30, scale=20.0, seed=7), logits(50, 30, scale=20.0, seed=8)
    for alpha in (0.1, 0.3):
        # |q (g - sum q g)| <= q (|g| + max |g|) <= 2 (1 - alpha) / alpha
        largest = gradient(partial(skew_kl, alpha=alpha), student, teacher).abs().max()
        assert largest <= 2 * (1 - alpha) / alpha


# ---- limits, bounds, symmetry --------------------------------------------------------------------


def test_skewed_divergences_become_the_plain_ones_as_alpha_goes_to_zero() -> None:
    student, teacher = logits(10, 60, seed=9), logits(10, 60, seed=10)
    torch.testing.assert_close(
        skew_kl(student, teacher, 1e-7), forward_kl(student, teacher), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        skew_reverse_kl(student, teacher, 1e-7), reverse_kl(student, teacher), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jensen_shannon_is_the_weighted_pair_of_skewed_divergences(beta: float) -> None:
    student, teacher = logits(10, 60, scale=4.0, seed=11), logits(10, 60, scale=4.0, seed=12)
    pair = beta * skew_kl(student, teacher, beta) + (1 - beta) * skew_reverse_kl(
        student, teacher, 1 - beta
    )
    torch.testing.assert_close(jensen_shannon(student, teacher, beta), pair, rtol=1e-5, atol=1e-6)


def test_jensen_shannon_at_one_half_and_total_variation_are_symmetric() -> None:
    a, b = logits(10, 60, scale=4.0, seed=13), logits(10, 60, scale=4.0, seed=14)
    for divergence in (jensen_shannon, total_variation):
        torch.testing.assert_close(divergence(a, b), divergence(b, a), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(forward_kl(a, b), reverse_kl(b, a), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(skew_kl(a, b), skew_reverse_kl(b, a), rtol=1e-5, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.0, 100.0),
    alpha=st.floats(0.001, 0.999),
    vocabulary=st.integers(1, 50),
)
def test_divergences_are_nonnegative_and_bounded(
    seed: int, scale: float, alpha: float, vocabulary: int
) -> None:
    student = logits(6, vocabulary, scale=scale, seed=seed)
    teacher = logits(6, vocabulary, scale=scale, seed=seed + 1)
    rounding = 2e-6
    for divergence in DIVERGENCES.values():
        assert (divergence(student, teacher) >= -rounding).all()
    assert (skew_kl(student, teacher, alpha) <= math.log(1 / alpha) + rounding).all()
    assert (skew_reverse_kl(student, teacher, alpha) <= math.log(1 / alpha) + rounding).all()
    assert (jensen_shannon(student, teacher, alpha) <= math.log(2) + rounding).all()
    assert (total_variation(student, teacher) <= 1 + rounding).all()


@every_divergence
def test_a_student_equal_to_its_teacher_has_divergence_and_gradient_zero(name: str) -> None:
    same = logits(10, 2000, scale=5.0, seed=15)
    assert DIVERGENCES[name](same, same.clone()).abs().max() < 1e-6
    assert gradient(DIVERGENCES[name], same, same.clone()).abs().max() < 1e-6


# ---- edges -------------------------------------------------------------------------------------


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_give_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(16)
    student = ((torch.rand(12, 40, generator=generator) * 2 - 1) * 1e4).to(dtype)
    teacher = ((torch.rand(12, 40, generator=generator) * 2 - 1) * 1e4).to(dtype)
    values_T = DIVERGENCES[name](student, teacher)
    assert values_T.dtype == torch.float32
    assert values_T.isfinite().all()
    assert gradient(DIVERGENCES[name], student, teacher).isfinite().all()


def test_huge_logits_keep_the_exact_value() -> None:
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert forward_kl(student, teacher).item() == pytest.approx(2e4)
    assert reverse_kl(student, teacher).item() == pytest.approx(2e4)
    assert skew_kl(student, teacher, 0.1).item() == pytest.approx(math.log(10))
    assert total_variation(student, teacher).item() == pytest.approx(1.0)


def test_a_one_hot_teacher_is_the_cross_entropy_of_its_id() -> None:
    student = logits(5, 30, seed=17)
    teacher = torch.full((5, 30), -INFINITY)
    ids_T = torch.tensor([0, 3, 7, 29, 12])
    teacher[torch.arange(5), ids_T] = 0.0
    log_q_T = torch.log_softmax(student.double(), -1)[torch.arange(5), ids_T]
    torch.testing.assert_close(forward_kl(student, teacher).double(), -log_q_T, rtol=1e-6, atol=0)
    expected_T = -torch.log(0.1 + 0.9 * log_q_T.exp())
    torch.testing.assert_close(
        skew_kl(student, teacher, 0.1).double(), expected_T, rtol=1e-6, atol=0
    )
    for divergence in (forward_kl, skew_kl, jensen_shannon, total_variation, skew_reverse_kl):
        assert divergence(student, teacher).isfinite().all()
        assert gradient(divergence, student, teacher).isfinite().all()
    assert reverse_kl(student, teacher).isposinf().all()


@every_divergence
def test_ids_masked_on_both_sides_do_not_count(name: str) -> None:
    student, teacher = logits(6, 30, seed=18), logits(6, 30, seed=19)
    padding = torch.full((6, 5), -INFINITY)
    wide_student, wide_teacher = torch.cat((student, padding), 1), torch.cat((teacher, padding), 1)
    divergence = DIVERGENCES[name]
    torch.testing.assert_close(divergence(wide_student, wide_teacher), divergence(student, teacher))
    wide = gradient(divergence, wide_student, wide_teacher)
    torch.testing.assert_close(wide[:, :30], gradient(divergence, student, teacher))
    assert (wide[:, 30:] == 0).all()


@pytest.mark.parametrize("logit", [0.0, -1e4])  # likely, and so unlikely that exp gives 0
def test_an_id_that_only_the_teacher_can_produce_makes_forward_kl_infinite(logit: float) -> None:
    student, teacher = logits(2, 20, seed=20), logits(2, 20, seed=21)
    student[0, 4] = -INFINITY
    teacher[0, 4] = logit
    assert forward_kl(student, teacher)[0] == INFINITY
    assert forward_kl(student, teacher)[1].isfinite()
    for divergence in (reverse_kl, skew_kl, skew_reverse_kl, jensen_shannon, total_variation):
        assert divergence(student, teacher).isfinite().all()
    for divergence in DIVERGENCES.values():
        assert not divergence(student, teacher).isnan().any()


@pytest.mark.parametrize("logit", [0.0, -1e4])
def test_an_id_that_only_the_student_can_produce_makes_reverse_kl_infinite(logit: float) -> None:
    student, teacher = logits(2, 20, seed=22), logits(2, 20, seed=23)
    student[0, 4] = logit
    teacher[0, 4] = -INFINITY
    assert reverse_kl(student, teacher)[0] == INFINITY
    assert reverse_kl(student, teacher)[1].isfinite()
    for divergence in (forward_kl, skew_kl, skew_reverse_kl, jensen_shannon, total_variation):
        assert divergence(student, teacher).isfinite().all()


def test_a_token_of_infinite_divergence_has_gradient_zero_and_does_not_affect_the_others() -> None:
    student, teacher = logits(2, 20, seed=24), logits(2, 20, seed=25)
    alone = gradient(forward_kl, student[1:], teacher[1:])
    student[0, 4] = -INFINITY
    both = gradient(forward_kl, student, teacher)
    assert (both[0] == 0).all()
    torch.testing.assert_close(both[1:], alone)


@every_divergence
def test_a_nan_logit_stays_visible(name: str) -> None:
    student, teacher = logits(2, 20, seed=26), logits(2, 20, seed=27)
    student[0, 3] = math.nan
    values_T = DIVERGENCES[name](student, teacher)
    assert values_T[0].isnan()
    assert values_T[1].isfinite()


def test_the_teacher_receives_no_gradient() -> None:
    student, teacher = logits(2, 20).requires_grad_(), logits(2, 20, seed=1).requires_grad_()
    skew_kl(student, teacher).sum().backward()
    assert teacher.grad is None


# ---- adaptive KL ---------------------------------------------------------------------------------


def test_adaptive_kl_looks_for_the_head_beyond_the_first_ids() -> None:
    student, teacher = logits(3, 2000, scale=0.1, seed=28), logits(3, 2000, scale=0.1, seed=29)
    expected_T = adaptive(probabilities(teacher), probabilities(student), 0.5)
    np.testing.assert_allclose(
        adaptive_kl(student, teacher).numpy(), expected_T, rtol=1e-3, atol=1e-6
    )


def test_adaptive_kl_weighs_by_the_gaps_of_head_and_tail() -> None:
    p, q = np.array([[0.45, 0.3, 0.15, 0.1]]), np.array([[0.25, 0.3, 0.05, 0.4]])
    # The head is the first id alone (0.45 + 0.3 > 0.5): gaps 0.2 against 0 + 0.1 + 0.3.
    expected = (0.2 * kl(p, q) + 0.4 * kl(q, p)) / 0.6
    values = adaptive_kl(torch.from_numpy(np.log(q)), torch.from_numpy(np.log(p)))
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12)


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        partial(jensen_shannon, beta=0.0),
        partial(jensen_shannon, beta=1.0),
        partial(skew_kl, alpha=0.0),
        partial(skew_kl, alpha=1.0),
        partial(skew_reverse_kl, alpha=-0.1),
        partial(adaptive_kl, mu=1.5),
    ],
)
def test_parameters_outside_of_the_open_interval_are_refused(call: Any) -> None:
    with pytest.raises(ValidationError):
        call(logits(1, 5), logits(1, 5))


def test_the_ends_of_jensen_shannon_are_refused_by_naming_what_to_use() -> None:
    with pytest.raises(ValidationError, match="forward_kl or type: reverse_kl"):
        jensen_shannon(logits(1, 5), logits(1, 5), beta=0.0)
