"""The loss of the output head without the [tokens, vocabulary] matrix.

    for each chunk of C tokens:
        student_CV = hidden_CD @ head.T                     product into a buffer
        teacher_CV = teacher_hidden_CD @ teacher_head.T     product into a second buffer
        values of all terms; student_CV := gradient of the loss by student_CV    elementwise
        dH_CD      = student_CV @ head                      gradient of the hidden states
        dW_VD     += student_CV.T @ hidden_CD               gradient of the head, in float32

Gradients in the forward. A backward that runs later would need the logits again, so it would have
to store all of them, which is what this module avoids, or repeat both matrix products. The loss is
one scalar and its gradient is linear in the gradient that arrives from above, so everything else
can be computed while the chunk's logits exist. The backward multiplies by that scalar.

In place. The gradient of the logits overwrites the logits: both are [C, V], and the products after
it read only the gradient.

All terms in one walk. The matrix products with the head take most of the time. The weighted
gradients of all terms are summed while they are gradients of logits, before the last two products,
so another term adds elementwise work only.

Memory. The two buffers are all the logits there ever are: `memory_bytes` for both. Besides them
there are the results: dH, and dW in float32, which plain autograd needs as well. The elementwise
part is in token_losses.py.

Axes: N loss positions, C positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillm_ray.config import SAMPLED
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, assemble
from distillm_ray.loss.teacher_tensors import TeacherHidden, TeacherLogits, TeacherTopK
from distillm_ray.loss.token_losses import Recipe, RowLosses, Rows, token_losses_in_place
from distillm_ray.models.heads import PLAIN_RULE
from distillm_ray.models.logit_rules import LogitRule

# By device. Small chunks stay in a CPU's caches. On a GPU every chunk reads and writes the head's
# gradient once more, which is 2 GB in float32 for V = 128k and D = 4,096, so chunks are large.
DEFAULT_MEMORY_BYTES = {"cpu": 64 * 2**20, "cuda": 1024 * 2**20}
# Rows of the vocabulary whose head gradient is added at a time where the sum needs a temporary.
SLAB_ROWS = 8_192
_CACHED_ROWS = 512


def fused_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    rule: LogitRule,
    vocabulary_size: int,
    request: LossRequest,
    memory_bytes: int | None = None,
) -> HeadLoss:
    """`plain_loss` in chunks: the logits of student and teacher take about `memory_bytes`.

    `memory_bytes` None is the device's default. Only the gradients that autograd will ask for are
    computed, and backward may be called once.

    Example:
        Two tokens, a vocabulary of two ids and a head that makes the logits equal to the hidden
        states. The first token costs log 2, the second log(1 + 1/e); both have weight 1/2.

        >>> from distillm_ray.config import CrossEntropy
        >>> from distillm_ray.loss.head_loss import WeightedTerm
        >>> hidden_ND = torch.tensor([[0.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> request = LossRequest(
        ...     terms=(WeightedTerm(term=CrossEntropy(), weights_N=torch.tensor([0.5, 0.5])),),
        ...     labels_N=torch.tensor([1, 1]),
        ... )
        >>> result = fused_loss(
        ...     hidden_ND, torch.eye(2), None, rule=PLAIN_RULE, vocabulary_size=2, request=request
        ... )
        >>> [round(value, 4) for value in result.values[0].tolist()]
        [0.6931, 0.3133]
        >>> round(result.loss.item(), 4)
        0.5032
        >>> result.loss.backward()
        >>> [[round(value, 4) for value in row] for row in hidden_ND.grad.tolist()]
        [[0.25, -0.25], [0.1345, -0.1345]]
    """
    memory_bytes = memory_bytes or DEFAULT_MEMORY_BYTES[hidden_ND.device.type]
    if request.needs_samples:
        request = _with_samples(
            hidden_ND,
            weight_VD,
            bias_V,
            rule=rule,
            vocabulary_size=vocabulary_size,
            request=request,
            memory_bytes=memory_bytes,
        )
    walk = _Walk(
        rule=rule,
        vocabulary_size=vocabulary_size,
        request=request,
        cross_entropy_weights_N=_cross_entropy_weights(request),
        memory_bytes=memory_bytes,
    )
    grad = torch.is_grad_enabled() and bool(request.terms)
    wants = (
        grad and hidden_ND.requires_grad,
        grad and weight_VD.requires_grad,
        grad and bias_V is not None and bias_V.requires_grad,
    )
    results: list[HeadLoss] = []
    loss = _FusedLoss.apply(hidden_ND, weight_VD, bias_V, walk, wants, results)
    return results[0]._replace(loss=loss)


def _cross_entropy_weights(request: LossRequest) -> Tensor | None:
    """`[N]`, the sum over the terms of the label: their gradients differ by the weight only.

    A policy gradient is a cross-entropy whose weight is multiplied by minus its slope.
    """
    total_N = None
    for one in request.terms:
        if not isinstance(one.term, SAMPLED):
            continue
        weights_N = one.weights_N
        if one.policy is not None:
            weights_N = -one.policy.slopes_N * weights_N
        total_N = weights_N if total_N is None else total_N + weights_N
    return total_N


@torch.no_grad()
def _with_samples(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    rule: LogitRule,
    vocabulary_size: int,
    request: LossRequest,
    memory_bytes: int,
) -> LossRequest:
    """The request with what its sampled tokens are worth: one more pass through both heads."""
    labels = LossRequest(labels_N=request.labels_N)
    log_q_N = fused_loss(
        hidden_ND,
        weight_VD,
        bias_V,
        rule=rule,
        vocabulary_size=vocabulary_size,
        request=labels,
        memory_bytes=memory_bytes,
    ).log_probs_N
    assert log_q_N is not None
    # The teacher's logits and their log-probabilities, in float32.
    chunk = max(1, memory_bytes // (8 * vocabulary_size))
    return request.with_samples(log_q_N, vocabulary_size=vocabulary_size, chunk=chunk)


# ---- the walk over chunks of tokens --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Walk:
    """The inputs of one call of fused_loss besides the student's tensors."""

    rule: LogitRule
    vocabulary_size: int
    request: LossRequest
    cross_entropy_weights_N: Tensor | None
    memory_bytes: int

    def run(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        wants: tuple[bool, bool, bool],
    ) -> tuple[HeadLoss, list[Tensor | None]]:
        """Loss and values, and the wanted gradients of hidden states, weight and bias."""
        # Rows of padding beyond the tokenizer's vocabulary are impossible ids: they are left out of
        # every product, and their gradient is 0.
        head_VD = weight_VD[: self.vocabulary_size]
        head_bias_V = None if bias_V is None else bias_V[: self.vocabulary_size]
        gradients = _Gradients(hidden_ND, weight_VD, bias_V, self.vocabulary_size, wants)
        recipe, teacher_bias_V = self._recipe(with_gradient=any(wants))
        num_tokens = len(hidden_ND)
        chunk = self._chunk_size(num_tokens, head_VD)
        # Allocated once and reused by every chunk.
        student_CV = head_VD.new_empty(chunk, self.vocabulary_size)
        teacher_CV = self._teacher_buffer(chunk)
        blocks: list[RowLosses] = []
        for start in range(0, num_tokens, chunk):
            stop = min(start + chunk, num_tokens)
            products_CV = student_CV[: stop - start]
            hidden_CD = hidden_ND[start:stop].to(head_VD.dtype)
            torch.mm(hidden_CD, head_VD.T, out=products_CV)
            rows = self._rows(start, stop, products_CV, teacher_CV)
            blocks += token_losses_in_place(recipe, rows, head_bias_V, teacher_bias_V)
            # From here on products_CV holds the gradient of the loss with respect to itself.
            gradients.add(start, stop, products_CV, hidden_CD, head_VD)
        return self._collect(blocks, hidden_ND), gradients.finished()

    def _recipe(self, *, with_gradient: bool) -> tuple[Recipe, Tensor | None]:
        teacher_rule, teacher_bias_V = PLAIN_RULE, None
        if isinstance(self.request.teacher, TeacherHidden):
            teacher_rule = self.request.teacher.head.rule
            teacher_bias_V = self.request.teacher.head.bias_V
        recipe = Recipe(
            # Kernels are compiled for each recipe: `on` and `weight` must not be part of it.
            divergences=tuple(divergence.formula for divergence in self.request.divergences),
            student_rule=self.rule,
            teacher_rule=teacher_rule,
            temperature=self.request.temperature,
            with_gradient=with_gradient,
        )
        return recipe, teacher_bias_V

    def _chunk_size(self, num_tokens: int, head_VD: Tensor) -> int:
        """Tokens of a chunk: within the memory, and chunks of nearly equal size."""
        bytes_per_logit = head_VD.element_size()
        if isinstance(self.request.teacher, TeacherHidden):
            bytes_per_logit += self.request.teacher.head.weight_VD.element_size()
        most = max(1, self.memory_bytes // (bytes_per_logit * self.vocabulary_size))
        num_chunks = max(1, math.ceil(num_tokens / most))
        return max(1, math.ceil(num_tokens / num_chunks))

    def _teacher_buffer(self, chunk: int) -> Tensor | None:
        if not self.request.divergences or not isinstance(self.request.teacher, TeacherHidden):
            return None
        weight_VD = self.request.teacher.head.weight_VD
        assert weight_VD.shape[0] == self.vocabulary_size, "the teacher's head has other ids"
        return weight_VD.new_empty(chunk, self.vocabulary_size)

    def _rows(self, start: int, stop: int, products_CV: Tensor, buffer_CV: Tensor | None) -> Rows:
        """The chunk's tensors; the teacher's product is computed into its buffer."""
        request, teacher, ids = self.request, None, None
        if request.divergences:
            match request.teacher:
                case TeacherHidden(values_ND=values_ND, head=head):
                    assert buffer_CV is not None
                    teacher = buffer_CV[: stop - start]
                    hidden_CD = values_ND[start:stop].to(head.weight_VD.dtype)
                    torch.mm(hidden_CD, head.weight_VD.T, out=teacher)
                case TeacherLogits(values_NV=values_NV):
                    teacher = values_NV[start:stop, : self.vocabulary_size]
                case TeacherTopK(ids_NK=ids_NK, log_probs_NK=log_probs_NK):
                    teacher, ids = log_probs_NK[start:stop], ids_NK[start:stop]
        labels_N, weights_N = request.labels_N, self.cross_entropy_weights_N
        return Rows(
            products_RV=products_CV,
            teacher=teacher,
            teacher_ids_RK=ids,
            weights=tuple(
                one.weights_N[start:stop]
                for one in request.terms
                if not isinstance(one.term, SAMPLED)
            ),
            alphas=tuple(
                None if one.alphas is None else one.alphas.alphas_N[start:stop]
                for one in request.terms
                if not isinstance(one.term, SAMPLED)
            ),
            labels_R=None if labels_N is None else labels_N[start:stop],
            cross_entropy_weights_R=None if weights_N is None else weights_N[start:stop],
        )

    def _collect(self, blocks: list[RowLosses], hidden_ND: Tensor) -> HeadLoss:
        """The blocks' values joined, weighted and summed."""
        empty = hidden_ND.new_zeros(0, dtype=torch.float32)
        divergences = [
            torch.cat([block.values[index] for block in blocks]) if blocks else empty
            for index in range(len(self.request.divergences))
        ]
        log_probs_N = None
        if self.request.labels_N is not None:
            log_probs = [one.log_probs_R for one in blocks if one.log_probs_R is not None]
            log_probs_N = torch.cat(log_probs) if log_probs else empty
        return assemble(self.request, divergences, log_probs_N, empty=empty)


class _Gradients:
    """Accumulators of the wanted gradients.

    The gradient of a chunk's hidden states is complete after its chunk and is written in their
    dtype. The head's and the bias's are sums over all chunks: they are kept in float32, because a
    sum of many small bfloat16 terms loses the later ones.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        vocabulary_size: int,
        wants: tuple[bool, bool, bool],
    ) -> None:
        dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        self._vocabulary_size = vocabulary_size
        self._hidden_ND = torch.empty_like(hidden_ND) if wants[0] else None
        self._weight_VD = None
        if wants[1]:
            self._weight_VD = torch.empty_like(weight_VD, dtype=dtype)
            # The first chunk overwrites the rows of the vocabulary (beta 0), so only the padding
            # rows are cleared. Without tokens there is no chunk, and all rows are cleared.
            self._weight_VD[vocabulary_size if len(hidden_ND) else 0 :].zero_()
        self._bias_V = (
            torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and wants[2] else None
        )
        self._slab_VD = None
        # A CPU has no product of bfloat16 matrices into float32: slabs of the product are computed
        # in bfloat16 and added. CUDA has one (`out_dtype`).
        if self._weight_VD is not None and weight_VD.dtype != dtype and not weight_VD.is_cuda:
            self._slab_VD = weight_VD.new_empty(min(SLAB_ROWS, vocabulary_size), weight_VD.shape[1])

    def add(
        self,
        start: int,
        stop: int,
        gradient_CV: Tensor,
        hidden_CD: Tensor,
        head_VD: Tensor,
    ) -> None:
        """Add one chunk, given the gradient of its logits before rule and bias."""
        if self._hidden_ND is not None:
            if self._hidden_ND.dtype == head_VD.dtype:
                torch.mm(gradient_CV, head_VD, out=self._hidden_ND[start:stop])
            else:
                self._hidden_ND[start:stop] = gradient_CV @ head_VD
        if self._bias_V is not None:
            bias_V = self._bias_V[: self._vocabulary_size]
            bias_V.add_(gradient_CV.sum(0, dtype=bias_V.dtype))
        if self._weight_VD is not None:
            weight_VD = self._weight_VD[: self._vocabulary_size]
            self._add_weight(weight_VD, gradient_CV, hidden_CD, beta=0 if start == 0 else 1)

    def _add_weight(
        self, weight_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor, *, beta: int
    ) -> None:
        """weight_VD = beta * weight_VD + the chunk's product; beta 0 does not read weight_VD."""
        if weight_VD.dtype == gradient_CV.dtype:
            weight_VD.addmm_(gradient_CV.T, hidden_CD, beta=beta)
        elif weight_VD.is_cuda:
            torch.addmm(
                weight_VD,
                gradient_CV.T,
                hidden_CD,
                beta=beta,
                out_dtype=weight_VD.dtype,
                out=weight_VD,
            )
        else:
            assert self._slab_VD is not None
            for first in range(0, len(weight_VD), SLAB_ROWS):
                rows_VD = weight_VD[first : first + SLAB_ROWS]
                slab_VD = self._slab_VD[: len(rows_VD)]
                slice_VC = gradient_CV[:, first : first + SLAB_ROWS].T
                torch.mm(slice_VC, hidden_CD, out=slab_VD)
                if beta == 0:
                    rows_VD.copy_(slab_VD)
                else:
                    rows_VD.add_(slab_VD)

    def finished(self) -> list[Tensor | None]:
        """Gradients of hidden states, weight and bias; None where not wanted."""
        return [self._hidden_ND, self._weight_VD, self._bias_V]


class _FusedLoss(torch.autograd.Function):
    """The walk as one operation of autograd: its backward scales what the forward computed.

    `box` receives the HeadLoss, because only tensors can be returned through autograd and only the
    loss may carry a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        walk: _Walk,
        wants: tuple[bool, bool, bool],
        box: list[HeadLoss],
    ) -> Tensor:
        result, ctx.gradients = walk.run(hidden_ND, weight_VD, bias_V, wants)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_ND, weight_VD, bias_V)]
        box.append(result)
        return result.loss

    @staticmethod
    def backward(ctx: Any, *loss_gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward of the fused loss can be called only once: the gradients are scaled in"
                " place and given away"
            )
        scaled = [
            None if gradient is None else _scaled(gradient, loss_gradients[0], dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        # The buffers now belong to autograd, which may use them as `.grad` without a copy.
        ctx.gradients = None
        return *scaled, None, None, None


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient times the scale, in `dtype`. The gradient is overwritten."""
    scale = scale.to(gradient.dtype)
    if gradient.dtype == dtype:
        return gradient.mul_(scale)
    rounded = torch.empty_like(gradient, dtype=dtype)
    if gradient.is_cuda:  # one kernel multiplies and rounds
        return torch.mul(gradient, scale, out=rounded)
    # A few rows at a time: between the two operations they stay in the processor's cache.
    for source, target in zip(
        gradient.split(_CACHED_ROWS), rounded.split(_CACHED_ROWS), strict=True
    ):
        target.copy_(source.mul_(scale))
    return rounded
