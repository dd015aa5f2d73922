"""Causal LMs on packed rows: loading, the forward pass, and the check of the output head.

A packed row holds whole sequences one after the other, without padding. It has no attention mask
and no cache, and its position ids restart at 0 with every sequence. `row_path.py` decides how a
model runs such a row so that no sequence sees another one.

Axes: L packed tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distillm_ray.errors import ModelError
from distillm_ray.models.directory import Role, key_of
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.partitioned import partitioned_loading, whole_in_forward
from distillm_ray.models.row_path import (
    RowPath,
    attention_arguments,
    attention_of,
    backbone_of,
    choose_path,
    run_row,
)

# The largest difference that counts as rounding, as a share of the largest logit. The head runs on
# the hidden states that the model's own forward computes, so only its product is rounded: by 1e-6
# in float32, and in bfloat16 by 4e-3 at every step of the head's rule.
HEAD_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CHECKED_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedModel:
    """A causal LM and the way in which it runs packed rows."""

    model: PreTrainedModel
    path: RowPath

    @property
    def remark(self) -> str:
        """How the model runs packed rows, where that is slower than usual; else empty."""
        if not self.path.notes:
            return ""
        return f"{type(self.model).__name__}: {self.path.describe}"

    def forward(self, token_ids_L: Tensor, position_ids_L: Tensor) -> Tensor:
        """The hidden states of a packed row after the final norm, `[L, D]`.

        Args:
            token_ids_L: on the model's device.
            position_ids_L: on the model's device; 0 where a sequence starts.
        """
        return run_row(backbone_of(self.model), token_ids_L, position_ids_L, self.path)


def load_packed_model(
    directory: Path,
    *,
    role: Role,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    partitioned_by: Mapping[str, Any] | None = None,
) -> PackedModel:
    """Load a causal LM for packed rows, in evaluation mode, from safetensors only.

    Args:
        partitioned_by: the settings of DeepSpeed's engine if ZeRO-3 is to divide the parameters
            among the ranks. All ranks load the model then.

    Raises:
        ModelError: the directory cannot be loaded, or no way of running it is known to be exact.
    """

    def load(attention: str | None) -> PreTrainedModel:
        settings: dict[str, Any] = {"attn_implementation": attention} if attention else {}
        loading = nullcontext()
        if partitioned_by is not None:
            loading = partitioned_loading(partitioned_by, dtype=dtype, device=device)
        try:
            with loading:
                model = AutoModelForCausalLM.from_pretrained(
                    directory,
                    dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=trust_remote_code,
                    **settings,
                )
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"{key_of(role)}: {directory} cannot be loaded: {error}") from error
        model.config.use_cache = False
        nn.Module.to(model, device)
        return model

    try:
        config = AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{key_of(role)}: {directory} cannot be loaded: {error}") from error
    model, path = choose_path(load, config, key=key_of(role), trained=role == "student")
    return PackedModel(model=model, path=path)


@torch.no_grad()
def check_head(model: PreTrainedModel, head: FrozenHead, *, role: Role) -> float:
    """Check that `head` on the backbone's hidden states gives the model's own logits.

    Returns the largest difference as a share of the largest logit. `model` needs its own output
    head, and the head's weights must be whole.

    Raises:
        ModelError: they differ.
    """
    vocabulary_size = head.weight_VD.shape[0]
    ids_L = torch.linspace(0, vocabulary_size - 1, CHECKED_TOKENS).long().to(model.device)
    settings: dict[str, Any] = {"input_ids": ids_L[None], "use_cache": False}
    settings |= attention_arguments(attention_of(model), (0, len(ids_L)))
    was_training = model.training
    model.eval()
    with whole_in_forward(model):
        expected_LV = model(**settings).logits[0, :, :vocabulary_size].float()
        found_LV = head.logits(backbone_of(model)(**settings).last_hidden_state[0])
    model.train(was_training)

    largest = expected_LV.abs().max().clamp_min(1e-6)
    difference = ((found_LV - expected_LV).abs().max() / largest).item()
    tolerance = HEAD_TOLERANCES[head.weight_VD.dtype]
    if not difference <= tolerance:  # NaN is refused as well
        raise ModelError(
            f"{key_of(role)}: the logits of {type(model).__name__} must be its output head applied"
            f" to its last hidden state (head rule: {head.rule.name}), but they differ by"
            f" {difference:.2g} of the largest logit, rounding explains {tolerance:g}: the model"
            " changes its logits after the head in an unknown way, and the divergence would"
            " compare other distributions than the model's; use another model"
        )
    return difference
