"""The student's output head as a layer that answers with a loss instead of logits.

It replaces the model's own head before `deepspeed.initialize` and shares its Parameter, so that
names, ties and saved files stay the model's, and ZeRO-3's hooks gather the weight around the
layer's forward: the whole fused walk happens inside of one forward, nothing in the backward.

Axes: N loss positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from distillm_ray.errors import ModelError
from distillm_ray.loss.fused import fused_loss
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, plain_loss
from distillm_ray.models.directory import Role, key_of
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.logit_rules import LogitRule, logit_rule
from distillm_ray.models.packed import check_packed_model


class DistillationHead(nn.Linear):
    """A linear layer that, given a request, returns the loss of hidden states.

    Without a request it is the linear layer it replaced (for `generate`, or the model's own
    forward).
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
        """`HeadLoss` where there is a request, else the matrix product and bias alone."""
        if request is None:
            return super().forward(hidden_ND)
        if self.implementation == "plain":
            return plain_loss(
                hidden_ND,
                self.weight,
                self.bias,
                rule=self.rule,
                vocabulary_size=self.vocabulary_size,
                request=request,
            )
        return fused_loss(
            hidden_ND,
            self.weight,
            self.bias,
            rule=self.rule,
            vocabulary_size=self.vocabulary_size,
            request=request,
            memory_bytes=self.memory_bytes,
        )


def install_distillation_head(
    model: PreTrainedModel,
    *,
    vocabulary_size: int,
    role: Role = "student",
    implementation: Literal["fused", "plain"] = "fused",
    memory_bytes: int | None = None,
) -> DistillationHead:
    """Put a DistillationHead in the place of a causal LM's output head; LoRA layers may be there.

    Call it before `deepspeed.initialize`, with whole parameters. `vocabulary_size` is the
    tokenizer's; rows of the head beyond it count as impossible.
    Raises ModelError: a head that is not a linear layer, an unknown rule, too few rows, or what
    `check_packed_model` refuses. `role` names the model in its messages.
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
    check_packed_model(
        model, FrozenHead(weight_VD=head.weight, bias_V=head.bias, rule=rule), role=role
    )
    distillation_head = DistillationHead(
        head,
        rule=rule,
        vocabulary_size=vocabulary_size,
        implementation=implementation,
        memory_bytes=memory_bytes,
    )
    model.set_output_embeddings(distillation_head)
    return distillation_head
