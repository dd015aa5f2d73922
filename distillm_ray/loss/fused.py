"""The loss of the output head without the [tokens, vocabulary] matrix.

    hidden_ND ── chunk of tokens ── product with the head ──► the chunk's logits
                                                                │ elementwise, in place
    dH_ND, dW_VD (float32) ◄── products ◄── gradient of the chunk's logits, loss

The gradients are computed in the forward, while the chunk's logits exist, and handed out in the
backward, scaled. Two buffers of chunk x V hold all logits there ever are; the elementwise part is
in token_losses.py.

Axes: N loss positions, C positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillm_ray.loss.head_loss import HeadLoss, LossRequest, assemble, weighted_sum
from distillm_ray.loss.teacher_tensors import TeacherHidden, TeacherLogits, TeacherTopK
from distillm_ray.loss.token_losses import Recipe, RowLosses, Rows, token_losses_in_place
from distillm_ray.models.heads import PLAIN_RULE
from distillm_ray.models.logit_rules import LogitRule

# By device: a CPU's caches like small chunks; on a GPU every chunk reads and writes the head's
# gradient once more, 2 GB in float32 for V = 128k and D = 4,096.
DEFAULT_MEMORY_BYTES = {"cpu": 64 * 2**20, "cuda": 1024 * 2**20}
# Rows of the vocabulary whose head gradient is added at a time where it needs a temporary.
SLAB_ROWS = 8_192


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
    """`plain_loss` in chunks: the logits of both sides take about `memory_bytes` at a time.

    None is the device's default. Only gradients that somebody asked for are computed; the head's
    is accumulated in float32.
    """
    walk = _Walk(
        rule=rule,
        vocabulary_size=vocabulary_size,
        request=request,
        memory_bytes=memory_bytes or DEFAULT_MEMORY_BYTES[hidden_ND.device.type],
    )
    has_loss = bool(request.terms) or request.cross_entropy_weights_N is not None
    grad = torch.is_grad_enabled() and has_loss
    wants = (
        grad and hidden_ND.requires_grad,
        grad and weight_VD.requires_grad,
        grad and bias_V is not None and bias_V.requires_grad,
    )
    answers: list[HeadLoss] = []
    loss = _FusedLoss.apply(hidden_ND, weight_VD, bias_V, walk, wants, answers)
    return answers[0]._replace(loss=loss)


# ---- the walk over chunks of tokens --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Walk:
    """What one call of fused_loss is about, besides the student's tensors."""

    rule: LogitRule
    vocabulary_size: int
    request: LossRequest
    memory_bytes: int

    def run(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        wants: tuple[bool, bool, bool],
    ) -> tuple[HeadLoss, list[Tensor | None]]:
        """Loss and values, and the wanted gradients of hidden states, weight and bias."""
        head_VD = weight_VD[: self.vocabulary_size]
        head_bias_V = None if bias_V is None else bias_V[: self.vocabulary_size]
        gradients = _Gradients(hidden_ND, weight_VD, bias_V, self.vocabulary_size, wants)
        recipe, teacher_bias_V = self._recipe(with_gradient=any(wants))
        num_tokens = len(hidden_ND)
        chunk = self._chunk_size(num_tokens, head_VD)
        student_CV = head_VD.new_empty(chunk, self.vocabulary_size)
        teacher_CV = self._teacher_buffer(chunk)
        answers: list[RowLosses] = []
        for start in range(0, num_tokens, chunk):
            stop = min(start + chunk, num_tokens)
            products_CV = student_CV[: stop - start]
            hidden_CD = hidden_ND[start:stop].to(head_VD.dtype)
            torch.mm(hidden_CD, head_VD.T, out=products_CV)
            rows = self._rows(start, stop, products_CV, teacher_CV)
            answers += token_losses_in_place(recipe, rows, head_bias_V, teacher_bias_V)
            gradients.add(start, stop, products_CV, hidden_CD, head_VD)
        return self._collect(answers, hidden_ND), gradients.finished()

    def _recipe(self, *, with_gradient: bool) -> tuple[Recipe, Tensor | None]:
        teacher_rule, teacher_bias_V = PLAIN_RULE, None
        if isinstance(self.request.teacher, TeacherHidden):
            teacher_rule = self.request.teacher.head.rule
            teacher_bias_V = self.request.teacher.head.bias_V
        recipe = Recipe(
            divergences=tuple(term.divergence for term in self.request.terms),
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
        if not self.request.terms or not isinstance(self.request.teacher, TeacherHidden):
            return None
        weight_VD = self.request.teacher.head.weight_VD
        assert weight_VD.shape[0] == self.vocabulary_size, "the teacher's head has other ids"
        return weight_VD.new_empty(chunk, self.vocabulary_size)

    def _rows(self, start: int, stop: int, products_CV: Tensor, buffer_CV: Tensor | None) -> Rows:
        """The chunk's tensors; the teacher's product is computed into its buffer."""
        request, teacher, ids = self.request, None, None
        if request.terms:
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
        labels_N, weights_N = request.labels_N, request.cross_entropy_weights_N
        return Rows(
            products_RV=products_CV,
            teacher=teacher,
            teacher_ids_RK=ids,
            weights=tuple(term.weights_N[start:stop] for term in request.terms),
            labels_R=None if labels_N is None else labels_N[start:stop],
            cross_entropy_weights_R=None if weights_N is None else weights_N[start:stop],
        )

    def _collect(self, answers: list[RowLosses], hidden_ND: Tensor) -> HeadLoss:
        """The blocks' values joined, weighted and summed."""
        empty = hidden_ND.new_zeros(0, dtype=torch.float32)
        divergences = tuple(
            torch.cat([answer.values[index] for answer in answers]) if answers else empty
            for index in range(len(self.request.terms))
        )
        losses = [
            weighted_sum(term.weights_N, values_N)
            for term, values_N in zip(self.request.terms, divergences, strict=True)
        ]
        log_probs_N = None
        if self.request.labels_N is not None:
            log_probs = [one.log_probs_R for one in answers if one.log_probs_R is not None]
            log_probs_N = torch.cat(log_probs) if log_probs else empty
            if self.request.cross_entropy_weights_N is not None:
                losses.append(weighted_sum(self.request.cross_entropy_weights_N, -log_probs_N))
        loss = torch.stack(losses).sum() if losses else empty.sum()
        return assemble(loss, divergences, log_probs_N)


class _Gradients:
    """Accumulators of the wanted gradients."""

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
            # The first chunk writes the vocabulary's rows; those of padding beyond it stay zero.
            self._weight_VD[vocabulary_size if len(hidden_ND) else 0 :].zero_()
        self._bias_V = (
            torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and wants[2] else None
        )
        self._slab_VD = None
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
        """A chunk's share, from the gradient of its products."""
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
        """beta times what is there, plus the product; with 0 what is there is not read."""
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
        """Gradients of hidden states, weight and bias; None where nobody asked."""
        return [self._hidden_ND, self._weight_VD, self._bias_V]


class _FusedLoss(torch.autograd.Function):
    """The walk as one operation of autograd: its backward only scales what the forward computed."""

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
        answer, ctx.gradients = walk.run(hidden_ND, weight_VD, bias_V, wants)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_ND, weight_VD, bias_V)]
        box.append(answer)
        return answer.loss

    @staticmethod
    def backward(ctx: Any, *loss_gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss hands out its gradients once: call backward once")
        scaled = [
            None if gradient is None else _scaled(gradient, loss_gradients[0], dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return *scaled, None, None, None


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient times the scale, in a dtype; the gradient itself is lost."""
    scale = scale.to(gradient.dtype)
    if gradient.dtype != dtype and gradient.is_cuda:
        # Rounded as it is written; on a CPU this would take a copy in between.
        return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
    return gradient.mul_(scale).to(dtype)
