"""The student's output head as a layer that returns a loss instead of logits.

The layer replaces the model's own head before `deepspeed.initialize` and shares its Parameter,
which ZeRO-3 may have partitioned already. Parameter names, ties and saved files stay the same, and
ZeRO-3's hooks gather the weight for the layer's forward. The fused walk needs the weight in the
forward only, so that is enough.

Axes: N loss positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from distillm_ray.errors import ModelError
from distillm_ray.loss.fused import fused_loss
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, plain_loss
from distillm_ray.loss.teacher_tensors import TeacherHidden
from distillm_ray.loss.token_health import TokenHealth, token_health
from distillm_ray.models.directory import Role, key_of
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.logit_rules import LogitRule, logit_rule
from distillm_ray.models.packed import check_head
from distillm_ray.models.partitioned import whole


class DistillationHead(nn.Linear):
    """A linear layer that returns the loss of hidden states when it is given a request.

    Without a request it behaves as the linear layer that it replaced, for `generate` and the
    model's own forward.
    """

    def __init__(
        self,
        head: nn.Linear,
        *,
        rule: LogitRule,
        vocabulary_size: int,
        implementation: Literal["fused", "plain"] = "fused",
        memory_bytes: int | None = None,
    ) -> None:
        super().__init__(head.in_features, head.out_features, head.bias is not None, device="meta")
        self.weight = head.weight
        self.bias = head.bias
        self.train(head.training)
        self.rule = rule
        self.vocabulary_size = vocabulary_size
        self.implementation = implementation
        self.memory_bytes = memory_bytes

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_ND: Tensor, request: LossRequest | None = None
    ) -> Tensor | HeadLoss:
        """`HeadLoss` if there is a request, else the matrix product with the bias added."""
        if request is None:
            return super().forward(hidden_ND)
        if request.is_self_check:
            own = TeacherHidden(values_ND=hidden_ND.detach(), head=self._frozen())
            request = replace(request, teacher=own)
        loss_of = plain_loss
        if self.implementation == "fused":
            loss_of = partial(fused_loss, memory_bytes=self.memory_bytes)
        result = loss_of(
            hidden_ND,
            self.weight,
            self.bias,
            rule=self.rule,
            vocabulary_size=self.vocabulary_size,
            request=request,
        )
        return result._replace(health=self._health(hidden_ND, request))

    def _frozen(self) -> FrozenHead:
        """This head as a teacher's: a view of the same weights."""
        return FrozenHead(
            weight_VD=self.weight.detach()[: self.vocabulary_size],
            bias_V=None if self.bias is None else self.bias.detach()[: self.vocabulary_size],
            rule=self.rule,
        )

    def _health(self, hidden_ND: Tensor, request: LossRequest) -> TokenHealth | None:
        if request.health_S is None or request.teacher is None or request.labels_N is None:
            return None
        return token_health(
            self._frozen().logits(hidden_ND.detach()[request.health_S]),
            request.teacher,
            request.health_S,
            request.labels_N[request.health_S],
        )


def install_distillation_head(
    model: PreTrainedModel,
    *,
    vocabulary_size: int,
    role: Role = "student",
    implementation: Literal["fused", "plain"] = "fused",
    memory_bytes: int | None = None,
) -> DistillationHead:
    """Replace a causal LM's output head by a DistillationHead. The model may have LoRA layers.

    Call it before `deepspeed.initialize`. `vocabulary_size` is the tokenizer's; ids of the head
    beyond it are impossible. `role` names the model in messages.

    Raises:
        ModelError: the head is not a linear layer or has too few rows, its logit rule is unknown,
            or `check_head` refuses the model.
    """
    head = model.get_output_embeddings()
    name = type(model).__name__
    if type(head) is not nn.Linear:
        raise ModelError(
            f"{key_of(role)}: the output head of {name} is a {type(head).__name__}, not a plain"
            " linear layer: the fused loss cannot replace it; do not adapt the head itself"
        )
    if head.out_features < vocabulary_size:
        raise ModelError(
            f"{key_of(role)}: the output head has {head.out_features} rows, the tokenizer has"
            f" {vocabulary_size} ids: some ids could never be learned"
        )
    rule = logit_rule(model.config.to_dict())
    with whole(list(head.parameters())):
        frozen = FrozenHead(weight_VD=head.weight, bias_V=head.bias, rule=rule)
        check_head(model, frozen, role=role)
    distillation_head = DistillationHead(
        head,
        rule=rule,
        vocabulary_size=vocabulary_size,
        implementation=implementation,
        memory_bytes=memory_bytes,
    )
    model.set_output_embeddings(distillation_head)
    return distillation_head
