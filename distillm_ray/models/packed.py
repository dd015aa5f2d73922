"""Causal LMs on packed rows: loading, the forward pass, and the check that both are exact.

A packed row holds whole sequences one after the other, without padding. It has no attention mask
and no cache, and its position ids restart at 0 with every sequence: transformers recognizes the
sequence boundaries by that. With the cache on, it ignores them.

Axes: L packed tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from distillm_ray.errors import ModelError
from distillm_ray.models.directory import Role, key_of
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.packed_attention import attend_sequence_by_sequence, packed_arguments

# Tokens of the two sequences that the check packs. Convolutions over tokens leak into the first
# few positions of a sequence and recurrent states into all of them, so a few tokens show either.
CHECKED_LENGTHS = (5, 3)

# The largest difference that counts as rounding, as a share of the largest logit. The head runs on
# the hidden states that the model's own forward computes, so only its product is rounded: by 1e-6
# in float32, and in bfloat16 by 4e-3 at every step of the head's rule.
HEAD_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# A packed row has another shape than a single sequence, and another kernel may round every layer
# differently: SmolLM2-135M under sdpa and eager attention differs by 2e-6 in float32 and by 3e-2
# in bfloat16. With attention across the boundary it differs by 0.5 to 0.9.
PACKING_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


def load_packed_model(
    directory: Path,
    *,
    role: Role,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM for packed rows, in evaluation mode, from safetensors only.

    Attention respects sequence boundaries at the least cost that the device offers:
    FlashAttention on CUDA where it is installed and the dtype is bfloat16, one sequence at a time
    on a CPU, otherwise sdpa with the block-diagonal mask of transformers.

    Raises:
        ModelError: the directory cannot be loaded.
    """
    flash = device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            attn_implementation="flash_attention_2" if flash else "sdpa",
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{key_of(role)}: {directory} cannot be loaded: {error}") from error
    if device.type == "cpu":
        attend_sequence_by_sequence(model)
    model.config.use_cache = False
    nn.Module.to(model, device)
    return model


def packed_forward(backbone: nn.Module, token_ids_L: Tensor, position_ids_L: Tensor) -> Tensor:
    """Return the hidden states of a packed row after the final norm, `[L, D]`.

    Args:
        backbone: a causal LM's `base_model`.
        token_ids_L: on the backbone's device.
        position_ids_L: on the backbone's device; 0 where a sequence starts.
    """
    output = backbone(
        input_ids=token_ids_L[None],
        position_ids=position_ids_L[None],
        use_cache=False,
        **packed_arguments(backbone, position_ids_L),
    )
    return output.last_hidden_state[0]


@torch.no_grad()
def check_packed_model(model: PreTrainedModel, head: FrozenHead, *, role: Role) -> None:
    """Check that `head` on the hidden states of a packed row gives the model's own logits.

    Two short sequences of different lengths run alone through the model's own forward, alone
    through backbone and head, and packed into one row through backbone and head. `model` needs its
    whole parameters and its own output head.

    Raises:
        ModelError: the head alone does not give the model's logits, or it does, but packing
            changes them.
    """
    vocabulary_size = head.weight_VD.shape[0]
    token_ids_L = torch.linspace(0, vocabulary_size - 1, sum(CHECKED_LENGTHS)).long()
    token_ids_L = token_ids_L.to(model.device)
    position_ids_L = torch.cat([torch.arange(length) for length in CHECKED_LENGTHS])
    sequences = token_ids_L.split(CHECKED_LENGTHS)

    was_training = model.training
    model.eval()
    expected_LV = torch.cat(
        [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
    )[:, :vocabulary_size].float()
    alone_LD = torch.cat(
        [
            model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            for ids in sequences
        ]
    )
    packed_LD = packed_forward(model.base_model, token_ids_L, position_ids_L.to(model.device))
    model.train(was_training)

    name = type(model).__name__
    difference = _largest_difference(head.logits(alone_LD), expected_LV)
    tolerance = HEAD_TOLERANCES[head.weight_VD.dtype]
    if not difference <= tolerance:  # NaN is refused as well
        raise ModelError(
            f"{key_of(role)}: the logits of {name} must be its output head applied to its last"
            f" hidden state (head rule: {head.rule.name}), but they differ by {difference:.2g} of"
            f" the largest logit, rounding explains {tolerance:g}: the model changes its logits"
            " after the head in an unknown way, and the divergence would compare other"
            " distributions than the model's; use another model"
        )
    difference = _largest_difference(head.logits(packed_LD), expected_LV)
    tolerance = PACKING_TOLERANCES[head.weight_VD.dtype]
    if not difference <= tolerance:
        raise ModelError(
            f"{key_of(role)}: {name} must keep the sequences of a packed row apart, but the logits"
            " of two packed sequences differ from those of each sequence alone by"
            f" {difference:.2g} of the largest logit, rounding explains {tolerance:g}: state leaks"
            " from one sequence into the next, and the loss would depend on which sequences share"
            " a row; use a model whose layers all restart where the position ids do"
        )


def _largest_difference(found_LV: Tensor, expected_LV: Tensor) -> float:
    """As a share of the largest expected logit."""
    largest = expected_LV.abs().max().clamp_min(1e-6)
    return ((found_LV - expected_LV).abs().max() / largest).item()
