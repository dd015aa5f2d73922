"""The student's output head as a layer that returns a loss instead of logits.

The layer replaces the model's own head before `deepspeed.initialize` and shares its Parameter.
Parameter names, ties and saved files stay the same, and ZeRO-3's hooks gather the weight for the
layer's forward. The fused walk needs the weight in the forward only, so that is enough.

Axes: N loss positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillm_ray.errors import ModelError
from distillm_ray.loss.fused import fused_loss
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, plain_loss
from distillm_ray.models.heads import finish_logits
from distillm_ray.models.logit_rules import LogitRule, logit_rule


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
    implementation: Literal["fused", "plain"] = "fused",
    memory_bytes: int | None = None,
) -> DistillationHead:
    """Replace a causal LM's output head by a DistillationHead. The model may have LoRA layers.

    Call it before `deepspeed.initialize`, while the parameters are whole. `vocabulary_size` is the
    tokenizer's; ids of the head beyond it are impossible. The head's logits are compared with the
    model's own on a few tokens.

    Raises:
        ModelError: the head is not a linear layer or has too few rows, its logit rule is unknown,
            or its logits are not the model's.
    """
    head = model.get_output_embeddings()
    name = type(model).__name__
    if type(head) is not nn.Linear:
        raise ModelError(
            f"the output head of the student ({name}) is a {type(head).__name__}, not a plain"
            " linear layer: the fused loss cannot replace it; do not adapt the head itself"
        )
    if head.out_features < vocabulary_size:
        raise ModelError(
            f"the student's output head has {head.out_features} rows, the tokenizer has"
            f" {vocabulary_size} ids: some ids could never be learned"
        )
    rule = logit_rule(model.config.to_dict())
    _check_rule(model, head, rule)
    distillation_head = DistillationHead(
        head,
        rule=rule,
        vocabulary_size=vocabulary_size,
        implementation=implementation,
        memory_bytes=memory_bytes,
    )
    model.set_output_embeddings(distillation_head)
    return distillation_head


@torch.no_grad()
def _check_rule(model: PreTrainedModel, head: nn.Linear, rule: LogitRule) -> None:
    """The head and its rule reproduce the logits of the model's own forward."""
    token_ids = torch.arange(1, 5, device=head.weight.device)[None]
    was_training = model.training
    model.eval()
    expected_NV = model(input_ids=token_ids, use_cache=False).logits[0].float()
    hidden_ND = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state[0]
    model.train(was_training)
    products_NV = cast(Tensor, nn.functional.linear(hidden_ND, head.weight))
    logits_NV = finish_logits(products_NV, head.bias, rule).float()
    scale = expected_NV.abs().max().clamp_min(1e-6)
    # The model may round its logits to its own dtype between the steps of the rule.
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 2e-2
    error = ((logits_NV - expected_NV).abs().max() / scale).item()
    if not error <= tolerance:
        raise ModelError(
            f"the logits of {type(model).__name__} are not its output head's ({rule.name}): they"
            f" differ by {error:.2g} of the largest; it does something to them that is not known"
            " here, and the divergence would be computed from other distributions"
        )
