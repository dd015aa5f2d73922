"""Attention over a packed row, one sequence at a time.

Packed rows hold whole sequences one after the other, and the position ids restart with each.
FlashAttention on GPUs computes each sequence by itself. Without it, transformers computes the whole
row under a block-diagonal mask: the cost is the square of the row's length. Here the cost is the
sum of the squares of the sequences' lengths.

Axes: L packed tokens; B = 1 row, H heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED_SDPA = "packed_sdpa"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def attend_sequence_by_sequence(model: PreTrainedModel) -> None:
    """Replace the attention of `model` by this module's, if its layers support that.

    Every forward pass of a packed row must then get `packed_arguments`. Other models keep the
    mask, which gives the same result.
    """
    layers = set(getattr(model.config, "layer_types", None) or _KNOWN_LAYERS)
    if type(model)._supports_attention_backend and layers <= _KNOWN_LAYERS:
        model.set_attn_implementation(PACKED_SDPA)


def packed_arguments(model: nn.Module, position_ids_L: Tensor) -> dict[str, Any]:
    """Arguments of a packed forward pass besides token and position ids."""
    config: Any = model.config
    if config._attn_implementation != PACKED_SDPA:
        return {}
    starts = torch.nonzero(position_ids_L == 0).flatten().tolist()
    return {"boundaries": (*starts, len(position_ids_L))}


def packed_sdpa(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    attention_mask: Tensor | None,
    *,
    boundaries: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Call the sdpa of transformers for each sequence; without `boundaries` the row is one.

    Returns `[B, L, H, D]`, like every attention function of transformers.
    """
    assert attention_mask is None, "packed rows have no padding"
    length = query_BHLD.shape[2]
    ends = boundaries or (0, length)
    assert ends[0] == 0 and ends[-1] == length
    parts = []
    for start, end in itertools.pairwise(ends):
        part, _ = sdpa_attention_forward(
            module,
            query_BHLD[:, :, start:end],
            key_BHLD[:, :, start:end],
            value_BHLD[:, :, start:end],
            _window_mask(end - start, sliding_window, query_BHLD.device),
            **settings,
        )
        parts.append(part)
    return torch.cat(parts, dim=1), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """`[1, 1, L, L]`, true where a query sees a key; None where the causal mask is the same."""
    if window is None or length <= window:
        return None
    at_L = torch.arange(length, device=device)
    distance_LL = at_L[:, None] - at_L[None, :]
    return ((distance_LL >= 0) & (distance_LL < window))[None, None]


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
