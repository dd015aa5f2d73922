"""The kernels that Inductor generates for an H100, without one: results, walks and temporaries.

They need Triton, which the installation for CPUs does not have: `make test-kernels`.

Axes: R rows, V vocabulary, K top-k.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from distillm_ray.config import AdaptiveKL, Divergence, ForwardKL, SkewKL, SkewReverseKL
from distillm_ray.loss import token_losses
from distillm_ray.models.heads import PLAIN_RULE
from distillm_ray.models.logit_rules import LogitRule
from tests.gpu.h100 import Generated, compile_for_h100
from tests.test_fused import ALL

R, V, K = 5, 3_001, 16  # a row is longer than a kernel's block, and neither divides the other
COMPILED = [one for one in ALL if not isinstance(one, AdaptiveKL)]


def recipe(
    *divergences: Divergence, rule: LogitRule = PLAIN_RULE, temperature: float = 1.0
) -> token_losses.Recipe:
    """With a gradient, both models with the same rule."""
    return token_losses.Recipe(
        divergences=divergences,
        student_rule=rule,
        teacher_rule=rule,
        temperature=temperature,
        with_gradient=True,
    )


def rows(
    num_terms: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    cross_entropy: bool = False,
    top_k: bool = False,
    curriculum: bool = False,
) -> token_losses.Rows:
    """Random products of the spread that language models have."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 3

    top = torch.log_softmax(normal(R, V), -1).topk(K)
    weights = tuple(torch.rand(R, generator=generator) for _ in range(num_terms + 1))
    return token_losses.Rows(
        products_RV=normal(R, V).to(dtype),
        teacher=top.values if top_k else normal(R, V).to(dtype),
        teacher_ids_RK=top.indices if top_k else None,
        weights=weights[:num_terms],
        alphas=(0.1 * weights[-1] if curriculum else None,) * num_terms,
        labels_R=torch.randint(V, (R,), generator=generator) if cross_entropy else None,
        cross_entropy_weights_R=weights[-1] if cross_entropy else None,
    )


def compile_kernel(wanted: token_losses.Recipe, *, top_k: bool) -> tuple[Any, Generated]:
    """What the fused loss calls on a GPU."""
    torch.compiler.reset()
    generated = Generated()
    for_h100 = partial(compile_for_h100, generated)
    token_losses.compiled.cache_clear()
    with mock.patch.object(torch, "compile", for_h100):
        return token_losses.compiled(wanted, top_k=top_k), generated


def check(
    wanted: token_losses.Recipe, given: token_losses.Rows, *, rtol: float = 1e-4
) -> Generated:
    """The generated kernels' results are those of the operations one by one."""
    kernel, generated = compile_kernel(wanted, top_k=given.teacher_ids_RK is not None)
    compare(kernel, wanted, given, rtol)
    return generated


def compare(
    kernel: Any, wanted: token_losses.Recipe, given: token_losses.Rows, rtol: float
) -> None:
    """The kernel's results and gradient equal those of the operations one by one."""
    mine = given._replace(products_RV=given.products_RV.clone())
    actual = kernel(mine, None, None)
    expected = token_losses.elementwise(wanted, given, None, None)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5)
    error = (mine.products_RV.float() - given.products_RV.float()).norm()
    assert error < rtol * given.products_RV.float().norm()


def matrices(generated: Generated) -> list[torch.dtype]:
    """Types of the temporaries that are as large as the logits."""
    return [dtype for elements, dtype in generated.allocated if elements >= R * V]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", COMPILED, ids=lambda divergence: divergence.type)
def test_a_divergence_is_one_kernel_of_three_walks(
    divergence: Divergence, dtype: torch.dtype
) -> None:
    rtol = 1e-4 if dtype == torch.float32 else 1e-2
    generated = check(recipe(divergence), rows(dtype=dtype), rtol=rtol)
    assert len(generated.launches) == 1
    assert generated.walks(generated.launches[0]) == 3
    assert matrices(generated) == []


def test_any_number_of_rows_runs_on_the_same_kernel() -> None:
    wanted = recipe(SkewKL())
    kernel, generated = compile_kernel(wanted, top_k=False)
    for num_rows in (5, 2, 4, 3):
        compare(kernel, wanted, rows().between(0, num_rows), 1e-4)
    assert len(generated.launches) == 4
    assert len(generated.sources) == 1


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        (recipe(SkewKL(), SkewReverseKL()), {"num_terms": 2}),
        (
            recipe(SkewKL(curriculum=True), SkewReverseKL(curriculum=True)),
            {"num_terms": 2, "curriculum": True},
        ),
        (recipe(SkewKL()), {"cross_entropy": True}),
        (recipe(), {"num_terms": 0, "cross_entropy": True}),
        (recipe(SkewKL(), rule=LogitRule(soft_cap=20.0)), {"cross_entropy": True}),
        (recipe(SkewKL(), rule=LogitRule(scale=0.5)), {}),
        (recipe(SkewKL(), temperature=2.0), {"cross_entropy": True}),
    ],
    ids=[
        "two terms",
        "curriculum",
        "and cross-entropy",
        "cross-entropy",
        "soft cap",
        "scale",
        "temperature",
    ],
)
def test_no_temporary_is_as_large_as_the_logits(
    wanted: token_losses.Recipe, options: dict[str, Any]
) -> None:
    assert matrices(check(wanted, rows(**options))) == []


@pytest.mark.parametrize("cross_entropy", [False, True])
def test_top_k_stores_a_byte_for_each_logit(cross_entropy: bool) -> None:
    generated = check(recipe(SkewKL()), rows(top_k=True, cross_entropy=cross_entropy))
    assert matrices(generated) == [torch.bool]


def test_ids_that_are_impossible_for_both_stay_finite() -> None:
    given = rows()
    assert given.teacher is not None
    given.products_RV[:, 7:90] = -torch.inf
    given.teacher[:, 7:90] = -torch.inf
    check(
        recipe(SkewKL(), SkewReverseKL()),
        given._replace(weights=given.weights * 2, alphas=(None, None)),
    )
    assert given.products_RV.isfinite().all()


def test_an_id_that_is_possible_for_one_side_only_gives_infinity_and_no_gradient() -> None:
    given = rows()
    assert given.teacher is not None
    given.products_RV[0, 7] = -torch.inf
    check(recipe(ForwardKL()), given)
    assert not given.products_RV[0].any()
    assert given.products_RV[1].any()
