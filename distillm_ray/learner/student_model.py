"""The student as the learner trains it: a packed causal LM that returns losses, not logits.

    token ids, position ids ──► backbone ──► hidden states ──► rows at loss positions ──► head, loss

Axes: L packed tokens, N loss positions, D hidden size.
"""

from __future__ import annotations

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillm_ray.config import LoraConfig, StudentConfig
from distillm_ray.errors import ConfigError, ModelError
from distillm_ray.loss.distillation_head import DistillationHead
from distillm_ray.loss.head_loss import HeadLoss, LossRequest
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.packed import load_packed_model, packed_forward


class PackedStudent(nn.Module):
    """Backbone and distillation head under one forward, which DeepSpeed's engine calls."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids_L: Tensor,
        position_ids_L: Tensor,
        loss_positions_N: Tensor,
        request: LossRequest,
    ) -> HeadLoss:
        """Return the head's loss for `request` at `loss_positions_N` of one packed row."""
        hidden_LD = packed_forward(self.model.base_model, token_ids_L, position_ids_L)
        head = self.model.get_output_embeddings()
        assert isinstance(head, DistillationHead)
        loss = head(hidden_LD.index_select(0, loss_positions_N), request)
        assert isinstance(loss, HeadLoss)
        return loss


def load_student(
    config: StudentConfig, *, device: torch.device, zero_stage: int
) -> PreTrainedModel:
    """Load the model of `config`, with its adapters and gradient checkpointing.

    Raises:
        ModelError: the directory cannot be loaded, or a LoRA target does not exist in the model.
        ConfigError: bfloat16 under ZeRO stage 0.
    """
    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.bfloat16 and zero_stage == 0:
        raise ConfigError(
            "learner.zero_stage 0 needs student.dtype: float32, got bfloat16"
            f" (student.dtype: {config.dtype}): DeepSpeed's optimizer for that pair makes a"
            " spurious first step; set learner.zero_stage=1, which costs nothing"
        )
    model = load_packed_model(
        config.model,
        role="student",
        dtype=dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
    )
    if config.lora is not None:
        add_adapters(model, config.lora)
    if config.gradient_checkpointing:
        # Non-reentrant checkpointing leaks entries of ZeRO-3's module stack.
        reentrant = zero_stage == 3
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    return model


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put LoRA layers around the backbone's linear layers and freeze everything else.

    Raises:
        ModelError: a target that the model does not have.
    """
    targets = config.target_modules
    if targets == "all-linear":
        # The output head is no target: tied, it shares its weight with the embedding.
        names = {
            name.rpartition(".")[2]
            for name, module in model.base_model.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        }
    else:
        names = set(targets)
    try:
        inject_adapter_in_model(
            PeftLoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                lora_dropout=config.dropout,
                target_modules=sorted(names),
            ),
            model,
        )
    except ValueError as error:
        raise ModelError(
            f"student.lora.target_modules {sorted(names)} do not fit the model: {error}"
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
