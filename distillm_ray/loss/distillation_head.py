"""The student's output head as a layer that answers with a loss instead of logits.

It replaces the model's own head before `deepspeed.initialize` and shares its Parameter, so that
names, ties and saved files stay the model's, and ZeRO-3's hooks gather the weight around the
layer's forward: the whole fused walk happens inside of one forward, nothing in the backward.

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
    implementation: Literal["fused", "plain"] = "fused",
    memory_bytes: int | None = None,
) -> DistillationHead:
    """Put a DistillationHead in the place of a causal LM's output head; LoRA layers may be there.

    Call it before `deepspeed.initialize`, with whole parameters. `vocabulary_size` is the
    tokenizer's; rows of the head beyond it count as impossible. The head's logits are compared
    with the model's own on a few tokens.
    Raises ModelError: a head that is not a linear layer, a rule that is not known, too few rows,
    other logits than the model's.
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
