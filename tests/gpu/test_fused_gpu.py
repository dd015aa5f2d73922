"""The fused loss on a GPU: compiled kernels against plain autograd, memory, and bfloat16.

Axes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distillm_ray.config import CrossEntropy, Divergence, SkewKL
from distillm_ray.loss.fused import fused_loss
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, WeightedTerm, plain_loss
from distillm_ray.loss.teacher_tensors import TeacherHidden, TeacherTopK
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.logit_rules import LogitRule
from tests.test_fused import ALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

N, V, D = 300, 4_001, 64
RULE = LogitRule(soft_cap=20.0)


def normal(*shape: int, seed: int) -> Tensor:
    """On the GPU, reproducible."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda")


def run(
    loss: Any, divergence: Divergence, dtype: torch.dtype, *, num_tokens: int = N, top_k: int = 0
) -> tuple[HeadLoss, Tensor, Tensor]:
    """The result, and the gradients of hidden states and head."""
    hidden_ND = normal(num_tokens, D, seed=0).to(dtype).requires_grad_()
    weight_VD = (normal(V, D, seed=1) * 0.3).to(dtype).requires_grad_()
    head = FrozenHead(weight_VD=(normal(V, D, seed=2) * 0.3).to(dtype))
    teacher = TeacherHidden(values_ND=normal(num_tokens, D, seed=3).to(dtype), head=head)
    if top_k:
        top = torch.log_softmax(head.logits(teacher.values_ND), -1).topk(top_k)
        teacher = TeacherTopK(ids_NK=top.indices, log_probs_NK=top.values)
    weights_N = torch.rand(num_tokens, device="cuda", generator=torch.Generator("cuda"))
    request = LossRequest(
        terms=(
            WeightedTerm(term=divergence, weights_N=weights_N),
            WeightedTerm(term=CrossEntropy(), weights_N=0.1 * weights_N),
        ),
        teacher=teacher,
        labels_N=torch.arange(num_tokens, device="cuda") % V,
    )
    options = {} if loss is plain_loss else {"memory_bytes": 2 * 100 * V * 4}
    result = loss(
        hidden_ND, weight_VD, None, rule=RULE, vocabulary_size=V, request=request, **options
    )
    result.loss.backward()
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    return result, hidden_ND.grad, weight_VD.grad


@pytest.mark.parametrize("top_k", [0, 16])
@pytest.mark.parametrize("divergence", ALL, ids=lambda divergence: divergence.type)
def test_compiled_kernels_equal_plain_autograd(divergence: Divergence, top_k: int) -> None:
    torch.compiler.reset()
    actual = run(fused_loss, divergence, torch.float32, top_k=top_k)
    expected = run(plain_loss, divergence, torch.float32, top_k=top_k)
    torch.testing.assert_close(actual[0].loss, expected[0].loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[0].values, expected[0].values, rtol=1e-3, atol=1e-4)
    for gradient, other in zip(actual[1:], expected[1:], strict=True):
        assert (gradient - other).norm() < 1e-3 * other.norm()


@pytest.mark.parametrize("num_tokens", [1, 99, 100, 101, 250])
def test_any_number_of_tokens_runs_on_the_same_kernels(num_tokens: int) -> None:
    actual = run(fused_loss, SkewKL(), torch.float32, num_tokens=num_tokens)
    expected = run(plain_loss, SkewKL(), torch.float32, num_tokens=num_tokens)
    for gradient, other in zip(actual[1:], expected[1:], strict=True):
        assert (gradient - other).norm() < 1e-3 * other.norm()


def test_bfloat16_is_as_near_to_float32_as_its_rounding() -> None:
    actual = run(fused_loss, SkewKL(), torch.bfloat16)
    expected = run(plain_loss, SkewKL(), torch.float32)
    torch.testing.assert_close(actual[0].loss, expected[0].loss, rtol=2e-2, atol=0)
    for gradient, other in zip(actual[1:], expected[1:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - other).norm() < 3e-2 * other.norm()


def test_the_logits_never_exist_as_a_whole() -> None:
    run(fused_loss, SkewKL(), torch.float32)  # compiled before the measurement
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(fused_loss, SkewKL(), torch.float32, num_tokens=2_000)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2_000 * V * 4  # plain holds several tensors of this size
