"""The fused loss against plain autograd in float64, chunk by chunk and term by term.

Axes: N loss positions, D hidden size, V vocabulary, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distillm_ray import types
from distillm_ray.config import (
    AdaptiveKL,
    CrossEntropy,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
    has_curriculum,
)
from distillm_ray.loss import token_losses
from distillm_ray.loss.divergences import skew_kl
from distillm_ray.loss.fused import fused_loss
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, WeightedTerm, plain_loss
from distillm_ray.loss.teacher_tensors import (
    TeacherHidden,
    TeacherLogits,
    TeacherTensors,
    TeacherTopK,
    teacher_tensors,
)
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.logit_rules import LogitRule

N, V, D = 23, 50, 8
PADDED_V = 56
Kind = Literal["hidden", "top_k", "logits"]
PLAIN = LogitRule()
CAPPED = LogitRule(soft_cap=5.0)
SCALED = LogitRule(scale=0.3)

ALL: tuple[Divergence, ...] = (
    ForwardKL(),
    ReverseKL(),
    JensenShannon(beta=0.3),
    SkewKL(),
    SkewReverseKL(),
    TotalVariation(),
    AdaptiveKL(),
)


@dataclass(frozen=True)
class Case:
    """A student's hidden states and head, a teacher's, and per-token weights, in float64."""

    hidden_ND: Tensor
    weight_VD: Tensor  # rows of padding beyond V
    bias_V: Tensor
    teacher_hidden_ND: Tensor
    teacher_weight_VD: Tensor
    teacher_bias_V: Tensor
    weights_N: Tensor
    labels_N: Tensor

    def teacher(self, kind: Kind, dtype: torch.dtype, *, rule: LogitRule, k: int) -> TeacherTensors:
        """One of the three kinds of targets, all of the same teacher."""
        head = FrozenHead(
            weight_VD=self.teacher_weight_VD.to(dtype),
            bias_V=self.teacher_bias_V.to(dtype),
            rule=rule,
        )
        hidden_ND = self.teacher_hidden_ND.to(dtype)
        logits_NV = head.logits(hidden_ND)
        match kind:
            case "hidden":
                return TeacherHidden(values_ND=hidden_ND, head=head)
            case "logits":
                return TeacherLogits(values_NV=logits_NV)
            case "top_k":
                top = torch.log_softmax(logits_NV, -1).topk(k)
                return TeacherTopK(ids_NK=top.indices, log_probs_NK=top.values)


def case(num_tokens: int = N, seed: int = 0) -> Case:
    """Random values from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Case(
        hidden_ND=normal(num_tokens, D),
        weight_VD=normal(PADDED_V, D),
        bias_V=normal(PADDED_V),
        teacher_hidden_ND=normal(num_tokens, D),
        teacher_weight_VD=normal(V, D),
        teacher_bias_V=normal(V),
        weights_N=torch.rand(num_tokens, generator=generator, dtype=torch.float64),
        labels_N=torch.randint(V, (num_tokens,), generator=generator),
    )


def request(
    c: Case,
    dtype: torch.dtype,
    divergences: tuple[Divergence, ...] = (SkewKL(),),
    *,
    kind: Kind = "hidden",
    rule: LogitRule = PLAIN,
    k: int = 10,
    cross_entropy: bool = False,
    temperature: float = 1.0,
) -> LossRequest:
    """A request for the case, with different weights for each term."""
    weights_N = c.weights_N.to(torch.promote_types(dtype, torch.float32))
    terms = [
        WeightedTerm(term=divergence, weights_N=weights_N.roll(index))
        for index, divergence in enumerate(divergences)
    ]
    if cross_entropy:
        terms.append(WeightedTerm(term=CrossEntropy(), weights_N=weights_N.flip(0)))
    return LossRequest(
        terms=tuple(terms),
        teacher=c.teacher(kind, dtype, rule=rule, k=k) if divergences else None,
        labels_N=c.labels_N,
        temperature=temperature,
    )


def run(
    loss: Any, c: Case, dtype: torch.dtype, wanted: LossRequest, *, rule: LogitRule = PLAIN
) -> tuple[HeadLoss, dict[str, Tensor]]:
    """The result and the gradients of three times its loss."""
    leaves = {
        name: getattr(c, name).to(dtype, copy=True).requires_grad_()
        for name in ("hidden_ND", "weight_VD", "bias_V")
    }
    result = loss(*leaves.values(), rule=rule, vocabulary_size=V, request=wanted)
    (3 * result.loss).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    assert all(gradient is not None for gradient in gradients.values())
    return result, gradients


def fused_in_chunks_of(tokens: int, dtype: torch.dtype = torch.float32) -> Any:
    """fused_loss with the memory for so many tokens of student and teacher logits."""
    bytes_per_token = 2 * V * torch.empty(0, dtype=dtype).element_size()
    return partial(fused_loss, memory_bytes=tokens * bytes_per_token)


def assert_same(
    actual: tuple[HeadLoss, dict[str, Tensor]],
    expected: tuple[HeadLoss, dict[str, Tensor]],
    *,
    rtol: float,
    atol: float,
) -> None:
    """Loss, values of each token and all gradients agree."""
    close = partial(torch.testing.assert_close, rtol=rtol, atol=atol, check_dtype=False)
    close(actual[0].loss, expected[0].loss)
    close(actual[0].losses_M, expected[0].losses_M)
    for a, b in zip(actual[0].values, expected[0].values, strict=True):
        close(a, b)
    if expected[0].log_probs_N is not None:
        close(actual[0].log_probs_N, expected[0].log_probs_N)
    for name, gradient in expected[1].items():
        close(actual[1][name], gradient)


# ---- against plain autograd in float64 -----------------------------------------------------------


@pytest.mark.parametrize("rule", [PLAIN, CAPPED, SCALED], ids=lambda rule: rule.name)
@pytest.mark.parametrize("kind", ["hidden", "top_k", "logits"])
@pytest.mark.parametrize("divergence", ALL, ids=lambda divergence: divergence.type)
def test_values_and_gradients_equal_plain_float64_autograd(
    divergence: Divergence, kind: Kind, rule: LogitRule
) -> None:
    c = case()
    expected = run(
        plain_loss,
        c,
        torch.float64,
        request(c, torch.float64, (divergence,), kind=kind, rule=rule),
        rule=rule,
    )
    wanted = request(c, torch.float32, (divergence,), kind=kind, rule=rule)
    actual = run(fused_in_chunks_of(5), c, torch.float32, wanted, rule=rule)
    assert_same(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 7, N, 10 * N])
def test_the_chunk_does_not_change_the_result(tokens: int) -> None:
    c = case()
    wanted = request(c, torch.float64, cross_entropy=True)
    expected = run(plain_loss, c, torch.float64, wanted)
    actual = run(fused_in_chunks_of(tokens, torch.float64), c, torch.float64, wanted)
    assert_same(actual, expected, rtol=1e-10, atol=1e-12)


def test_the_block_of_the_elementwise_part_does_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    c = case()
    wanted = request(c, torch.float64, cross_entropy=True)
    expected = run(plain_loss, c, torch.float64, wanted)
    monkeypatch.setitem(token_losses.BLOCK_ELEMENTS, "cpu", 3 * V)
    actual = run(fused_in_chunks_of(7, torch.float64), c, torch.float64, wanted)
    assert_same(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["hidden", "top_k", "logits"])
def test_several_divergences_and_cross_entropy_mix_in_one_walk(kind: Kind) -> None:
    c = case(seed=1)
    wanted = request(
        c, torch.float64, (SkewKL(), SkewReverseKL(), ForwardKL()), kind=kind, cross_entropy=True
    )
    expected = run(plain_loss, c, torch.float64, wanted)
    actual = run(fused_in_chunks_of(4, torch.float64), c, torch.float64, wanted)
    assert_same(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_temperature_applies_to_divergences_and_not_to_cross_entropy(kind: Kind) -> None:
    c = case(seed=2)
    wanted = request(c, torch.float64, kind=kind, cross_entropy=True, temperature=2.5)
    actual = run(fused_in_chunks_of(4, torch.float64), c, torch.float64, wanted)
    assert_same(actual, run(plain_loss, c, torch.float64, wanted), rtol=1e-10, atol=1e-12)
    student_NV = c.hidden_ND @ c.weight_VD[:V].T + c.bias_V[:V]
    teacher_NV = c.teacher_hidden_ND @ c.teacher_weight_VD.T + c.teacher_bias_V
    torch.testing.assert_close(
        actual[0].values[0], skew_kl(student_NV / 2.5, teacher_NV / 2.5, 0.1)
    )
    log_probs_N = torch.log_softmax(student_NV, -1)[torch.arange(N), c.labels_N]
    torch.testing.assert_close(actual[0].log_probs_N, log_probs_N)


def test_cross_entropy_alone_needs_no_teacher() -> None:
    c = case(seed=3)
    wanted = request(c, torch.float64, (), cross_entropy=True)
    result, gradients = run(fused_in_chunks_of(4, torch.float64), c, torch.float64, wanted)
    leaves = [c.hidden_ND.clone(), c.weight_VD.clone(), c.bias_V.clone()]
    hidden_ND, weight_VD, bias_V = (leaf.requires_grad_() for leaf in leaves)
    losses_N = torch.nn.functional.cross_entropy(
        hidden_ND @ weight_VD[:V].T + bias_V[:V], c.labels_N, reduction="none"
    )
    loss = (c.weights_N.flip(0) * losses_N).sum()
    (3 * loss).backward()
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(gradients["hidden_ND"], hidden_ND.grad)
    torch.testing.assert_close(gradients["weight_VD"], weight_VD.grad)
    torch.testing.assert_close(gradients["bias_V"], bias_V.grad)


def test_gradients_are_the_slopes_of_the_loss_along_random_directions() -> None:
    c = case(num_tokens=5)
    wanted = request(c, torch.float64, (JensenShannon(beta=0.3),), rule=CAPPED, cross_entropy=True)
    names = ("hidden_ND", "weight_VD", "bias_V")
    _, gradients = run(fused_in_chunks_of(2, torch.float64), c, torch.float64, wanted, rule=CAPPED)

    def loss(step: float, directions: dict[str, Tensor]) -> Tensor:
        moved = [getattr(c, name) + step * directions[name] for name in names]
        return 3 * fused_loss(*moved, rule=CAPPED, vocabulary_size=V, request=wanted).loss

    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        directions = {
            name: torch.randn(getattr(c, name).shape, generator=generator, dtype=torch.float64)
            for name in names
        }
        slope = (loss(1e-6, directions) - loss(-1e-6, directions)) / 2e-6
        expected = sum((gradients[name] * directions[name]).sum() for name in names)
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-7)


# ---- what is computed, and what is not -----------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.num_elements = max(self.num_elements, value.numel())
        return result


def test_no_tensor_of_all_tokens_by_vocabulary_is_made() -> None:
    c = case(num_tokens=200)
    with LargestTensor() as largest:
        run(plain_loss, c, torch.float32, request(c, torch.float32))
    assert largest.num_elements == 200 * V
    wanted = request(c, torch.float32)
    with LargestTensor() as largest:
        run(fused_in_chunks_of(20), c, torch.float32, wanted)
    assert largest.num_elements == 200 * D  # the hidden states; a chunk of logits has 20 * V


def test_padding_rows_of_the_head_get_gradient_zero() -> None:
    c = case()
    _, gradients = run(fused_in_chunks_of(5), c, torch.float32, request(c, torch.float32))
    assert gradients["weight_VD"].shape == (PADDED_V, D)
    assert (gradients["weight_VD"][V:] == 0).all()
    assert (gradients["bias_V"][V:] == 0).all()
    assert (gradients["weight_VD"][:V] != 0).any()


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_keep_theirs() -> None:
    c = case()
    wanted = request(c, torch.float64)
    _, expected = run(plain_loss, c, torch.float64, wanted)
    hidden_ND = c.hidden_ND.clone().requires_grad_()
    with LargestTensor() as largest:
        result = fused_in_chunks_of(2, torch.float64)(
            hidden_ND, c.weight_VD, c.bias_V, rule=PLAIN, vocabulary_size=V, request=wanted
        )
        (3 * result.loss).backward()
    torch.testing.assert_close(hidden_ND.grad, expected["hidden_ND"])
    assert largest.num_elements < PADDED_V * D  # views of the weight's first V rows at most


def test_without_gradients_only_values_are_computed() -> None:
    c = case()
    wanted = request(c, torch.float64)
    expected, _ = run(plain_loss, c, torch.float64, wanted)
    hidden_ND = c.hidden_ND.clone().requires_grad_()
    with torch.no_grad():
        result = fused_loss(
            hidden_ND, c.weight_VD, c.bias_V, rule=PLAIN, vocabulary_size=V, request=wanted
        )
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.log_probs_N, expected.log_probs_N)


def test_log_probabilities_alone_give_a_loss_of_zero_without_gradient() -> None:
    c = case()
    result = fused_loss(
        c.hidden_ND.clone().requires_grad_(),
        c.weight_VD,
        None,
        rule=PLAIN,
        vocabulary_size=V,
        request=LossRequest(labels_N=c.labels_N),
    )
    assert result.loss == 0
    assert result.log_probs_N is not None
    log_q_NV = torch.log_softmax(c.hidden_ND @ c.weight_VD[:V].T, -1)
    torch.testing.assert_close(result.log_probs_N, log_q_NV[torch.arange(N), c.labels_N])


@pytest.mark.parametrize("loss", [fused_loss, plain_loss])
def test_a_rank_without_loss_tokens_takes_part_with_gradients_of_zero(loss: Any) -> None:
    c = case(num_tokens=0)
    result, gradients = run(loss, c, torch.float32, request(c, torch.float32, cross_entropy=True))
    assert result.loss == 0
    assert result.num_infinite == 0
    assert (gradients["weight_VD"] == 0).all()
    assert gradients["hidden_ND"].shape == (0, D)


def test_backward_of_a_fused_loss_can_be_called_only_once() -> None:
    c = case()
    hidden_ND = c.hidden_ND.clone().requires_grad_()
    result = fused_loss(
        hidden_ND,
        c.weight_VD,
        None,
        rule=PLAIN,
        vocabulary_size=V,
        request=request(c, torch.float64),
    )
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be called only once"):
        result.loss.backward()


# ---- infinite and undefined values ---------------------------------------------------------------


@pytest.mark.parametrize("loss", [fused_loss, plain_loss])
def test_infinite_tokens_are_counted_and_left_out_of_loss_and_gradient(loss: Any) -> None:
    c = case()
    logits_NV = c.teacher("logits", torch.float64, rule=PLAIN, k=0)
    assert isinstance(logits_NV, TeacherLogits)
    values_NV = logits_NV.values_NV.clone()
    values_NV[[2, 5], 7] = -math.inf  # the student can produce id 7 there: reverse KL is infinite
    wanted = replace(
        request(c, torch.float64, (ReverseKL(),), kind="logits", cross_entropy=True),
        teacher=TeacherLogits(values_NV=values_NV),
    )
    result, gradients = run(loss, c, torch.float64, wanted)
    assert result.num_infinite == 2
    assert result.values[0].isposinf().nonzero().flatten().tolist() == [2, 5]
    without = replace(
        request(c, torch.float64, (ReverseKL(),), kind="logits", cross_entropy=True),
        terms=(
            WeightedTerm(
                term=ReverseKL(),
                weights_N=c.weights_N.index_fill(0, torch.tensor([2, 5]), 0.0),
            ),
            wanted.terms[1],
        ),
    )
    expected, expected_gradients = run(plain_loss, c, torch.float64, without)
    torch.testing.assert_close(result.loss, expected.loss)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_a_non_finite_hidden_state_shows_in_the_loss() -> None:
    c = case()
    c.hidden_ND[3, 0] = math.nan
    result, _ = run(fused_in_chunks_of(4), c, torch.float32, request(c, torch.float32))
    assert result.loss.isnan()
    assert result.num_infinite == 0


# ---- top-k ---------------------------------------------------------------------------------------


def test_top_k_with_all_ids_is_exact() -> None:
    c = case()
    for divergence in ALL:
        exact = run(fused_loss, c, torch.float64, request(c, torch.float64, (divergence,)))
        wanted = request(c, torch.float64, (divergence,), kind="top_k", k=V)
        assert_same(run(fused_loss, c, torch.float64, wanted), exact, rtol=1e-9, atol=1e-9)


def test_top_k_is_the_divergence_of_k_ids_and_one_bucket() -> None:
    c = case()
    result, _ = run(
        fused_loss, c, torch.float64, request(c, torch.float64, (ForwardKL(),), kind="top_k", k=5)
    )
    p_NV = torch.softmax(c.teacher_hidden_ND @ c.teacher_weight_VD.T + c.teacher_bias_V, -1)
    q_NV = torch.softmax(c.hidden_ND @ c.weight_VD[:V].T + c.bias_V[:V], -1)
    p_NK, ids_NK = p_NV.topk(5)
    q_NK = q_NV.gather(-1, ids_NK)
    p_tail_N, q_tail_N = 1 - p_NK.sum(-1), 1 - q_NK.sum(-1)
    expected_N = (p_NK * (p_NK / q_NK).log()).sum(-1) + p_tail_N * (p_tail_N / q_tail_N).log()
    torch.testing.assert_close(result.values[0], expected_N)


def test_a_tail_lost_to_rounding_stays_possible() -> None:
    c = case()
    log_probs_NK = torch.tensor([[0.0, -40.0]]).expand(N, 2)  # float32: the mass is exactly 1
    ids_NK = torch.tensor([[1, 2]]).expand(N, 2)
    wanted = replace(
        request(c, torch.float32, (ReverseKL(),)),
        teacher=TeacherTopK(ids_NK=ids_NK, log_probs_NK=log_probs_NK),
    )
    result, gradients = run(fused_in_chunks_of(4), c, torch.float32, wanted)
    assert result.num_infinite == 0
    assert result.loss.isfinite()
    assert gradients["hidden_ND"].isfinite().all()


def test_top_k_refuses_a_temperature_by_naming_the_keys() -> None:
    c = case()
    with pytest.raises(ValueError, match=r"loss\.temperature must be 1 with targets\.type: top_k"):
        request(c, torch.float32, kind="top_k", temperature=2.0)


# ---- bfloat16 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [fused_loss, plain_loss])
def test_bfloat16_is_as_near_to_float32_as_its_rounding(loss: Any) -> None:
    c = case(num_tokens=64)
    rounded = Case(
        **{
            name: value.bfloat16().double() if value.is_floating_point() else value
            for name, value in vars(c).items()
        }
    )
    expected = run(plain_loss, rounded, torch.float32, request(rounded, torch.float32))
    result, gradients = run(loss, rounded, torch.bfloat16, request(rounded, torch.bfloat16))
    assert result.loss.dtype == torch.float32
    assert result.values[0].dtype == torch.float32
    torch.testing.assert_close(result.loss, expected[0].loss, rtol=1e-2, atol=0)
    for name, gradient in expected[1].items():
        assert gradients[name].dtype == torch.bfloat16
        error = (gradients[name].float() - gradient).norm() / gradient.norm()
        assert error < 1e-2, (name, error)


def test_the_heads_gradient_is_accumulated_in_float32() -> None:
    c = case(num_tokens=4096, seed=5)
    one = Case(
        **{
            name: value.bfloat16().double() if value.is_floating_point() else value
            for name, value in vars(c).items()
        }
    )
    _, expected = run(plain_loss, one, torch.float32, request(one, torch.float32))
    chunks = partial(fused_loss, memory_bytes=8 * 2 * V * 2)  # 512 chunks of 8 tokens
    _, gradients = run(chunks, one, torch.bfloat16, request(one, torch.bfloat16))
    gradient = expected["weight_VD"]
    error = (gradients["weight_VD"].float() - gradient).norm() / gradient.norm()
    assert error < 5e-3  # summed in bfloat16 it would be several percent


# ---- the compiled path ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "kind"),
    [
        (SkewKL(), "hidden"),
        (SkewReverseKL(curriculum=True), "hidden"),
        (JensenShannon(), "hidden"),
        (ReverseKL(), "top_k"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.type,
)
def test_the_elementwise_part_is_one_graph_for_the_compiler(
    divergence: Divergence, kind: Kind
) -> None:
    c = case()
    recipe = token_losses.Recipe(
        divergences=(divergence,),
        student_rule=CAPPED,
        teacher_rule=PLAIN,
        temperature=1.0,
        with_gradient=True,
    )
    teacher = c.teacher("logits", torch.float32, rule=PLAIN, k=5)
    assert isinstance(teacher, TeacherLogits)
    values, ids = teacher.values_NV, None
    if kind == "top_k":
        top_k = c.teacher("top_k", torch.float32, rule=PLAIN, k=5)
        assert isinstance(top_k, TeacherTopK)
        values, ids = top_k.log_probs_NK, top_k.ids_NK
    eager = token_losses.Rows(
        products_RV=(c.hidden_ND @ c.weight_VD[:V].T).float(),
        teacher=values,
        teacher_ids_RK=ids,
        weights=(c.weights_N.float(),),
        alphas=(0.01 + 0.1 * c.weights_N.float() if has_curriculum(divergence) else None,),
        labels_R=c.labels_N,
        cross_entropy_weights_R=c.weights_N.float(),
    )
    traced = eager._replace(products_RV=eager.products_RV.clone())
    expected = token_losses.elementwise(recipe, eager, None, None)
    torch.compiler.reset()
    compiled = torch.compile(
        partial(token_losses.elementwise, recipe), backend="aot_eager", fullgraph=True
    )
    actual = compiled(traced, None, None)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(traced.products_RV, eager.products_RV)


# ---- messages to tensors -------------------------------------------------------------------------


def test_bfloat16_targets_come_back_bit_for_bit_from_their_uint16_view() -> None:
    values_ND = torch.randn(5, D).bfloat16()
    message = types.HiddenTargets(values_TD=values_ND.view(torch.uint16).numpy())
    head = FrozenHead(weight_VD=torch.randn(V, D).bfloat16())
    teacher = teacher_tensors(message, head, "cpu")
    assert isinstance(teacher, TeacherHidden)
    assert teacher.values_ND.dtype == torch.bfloat16
    assert torch.equal(teacher.values_ND, values_ND)


def test_targets_are_copied_out_of_read_only_memory() -> None:
    array = np.zeros((2, V), dtype=np.float32)
    array.flags.writeable = False
    teacher = teacher_tensors(types.LogitTargets(values_TV=array), None, "cpu")
    assert isinstance(teacher, TeacherLogits)
    teacher.values_NV.add_(1.0)
    assert (array == 0).all()
