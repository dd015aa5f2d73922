"""The student as the learner trains it: a Hugging Face model that answers at loss positions only.

    token ids, position ids ──► backbone ──► hidden states ──► rows at loss positions ──► head, loss

Packing: one row, position ids that restart with every sequence, no attention mask and no cache is
what transformers reads as separate sequences. With the cache on it would not. On a CPU they are
computed one by one (packed_attention.py).

Axes: L packed tokens, N loss positions, D hidden size.
"""

from __future__ import annotations

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from distillm_ray.config import LoraConfig, StudentConfig
from distillm_ray.errors import ConfigError, ModelError
from distillm_ray.loss.distillation_head import DistillationHead
from distillm_ray.loss.head_loss import HeadLoss, LossRequest
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.packed_attention import attend_sequence_by_sequence, packed_arguments


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
        """What the head answers to `request` at `loss_positions_N` of one packed row."""
        hidden_1LD = self.model.base_model(
            input_ids=token_ids_L[None],
            position_ids=position_ids_L[None],
            use_cache=False,
            **packed_arguments(self.model, position_ids_L),
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        assert isinstance(head, DistillationHead)
        answer = head(hidden_1LD[0].index_select(0, loss_positions_N), request)
        assert isinstance(answer, HeadLoss)
        return answer


def load_student(
    config: StudentConfig, *, device: torch.device, zero_stage: int
) -> PreTrainedModel:
    """The model of `config`, adapters and gradient checkpointing included.

    Raises:
        ModelError: no safetensors, or a LoRA target that the model does not have.
        ConfigError: bfloat16 under ZeRO stage 0.
    """
    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.bfloat16 and zero_stage == 0:
        raise ConfigError(
            "learner.zero_stage 0 needs student.dtype: float32, got bfloat16"
            f" (student.dtype: {config.dtype}): DeepSpeed's optimizer for that pair makes a"
            " spurious first step; set learner.zero_stage=1, which costs nothing"
        )
    # Packed rows need no mask with flash attention.
    flash = device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=config.trust_remote_code,
            attn_implementation="flash_attention_2" if flash else "sdpa",
        )
    except OSError as error:
        raise ModelError(f"student.model {config.model} cannot be loaded: {error}") from error
    if device.type == "cpu":
        attend_sequence_by_sequence(model)
    model.config.use_cache = False
    if config.lora is not None:
        add_adapters(model, config.lora)
    if config.gradient_checkpointing:
        # The other kind leaks entries of ZeRO-3's module stack.
        reentrant = zero_stage == 3
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    nn.Module.to(model, device)
    return model


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put LoRA layers around the backbone's linear layers; only they take gradients.

    Raises:
        ModelError: a target that the model does not have.
    """
    targets = config.target_modules
    if targets == "all-linear":
        # Of the backbone: the head is no target, and shares the embedding when tied.
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
