"""Attention of packed rows, one sequence at a time, as an attention function of transformers.

Under transformers' own sdpa a packed row is computed whole under a block-diagonal mask: the cost is
the square of the row's length. Here the cost is the sum of the squares of the sequences' lengths.
sdpa also ignores what it does not know: the soft cap of Gemma 2, the sinks of GPT-OSS. This
function computes both, and refuses every other argument that might change the result.

Axes: L packed tokens; B = 1 row, H heads, G heads of keys and values.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# A name with "sdpa" in it would make transformers ask whether the class supports sdpa.
BY_SEQUENCE = "by_sequence"
SHORT = 200  # tokens
KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})

# Arguments that models hand to every attention function and that do not change its result.
_IRRELEVANT = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


class UnknownAttention(Exception):
    """A model calls its attention in a way that this module does not know."""


def supports_by_sequence(model: PreTrainedModel) -> bool:
    """Whether the attention of `model` can be replaced; a forward pass may still refuse it."""
    layers = set(getattr(model.config, "layer_types", None) or KNOWN_LAYERS)
    return type(model)._supports_attention_backend and layers <= KNOWN_LAYERS


def by_sequence(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    attention_mask: Tensor | None,
    *,
    boundaries: Sequence[int] | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Returns `[B, L, H, D]`, like every attention function of transformers.

    Args:
        boundaries: starts of the sequences, and L. Given to the model's forward, which must hand
            it on.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: `[H]`, a sink per head: a score that takes part in the softmax and has no value.

    Raises:
        UnknownAttention: the model makes its own mask, does not hand `boundaries` on, or passes an
            argument that this function does not know.
    """
    name = type(module).__name__
    boundaries = checked_boundaries(name, query_BHLD, attention_mask, boundaries, others)
    # As in transformers' sdpa.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    parts = []
    for start, end in itertools.pairwise(boundaries):
        query, key, value = (
            tensor[:, :, start:end] for tensor in (query_BHLD, key_BGLD, value_BGLD)
        )
        mask = _window_mask(end - start, sliding_window, query.device)
        plain = softcap is None and s_aux is None
        if plain and not (causal and mask is None and _is_slow_in_sdpa(module, query)):
            part, _ = sdpa_attention_forward(
                module,
                query,
                key,
                value,
                mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
            )
        else:
            part = _explicit(module, query, key, value, mask, scaling, dropout, softcap, s_aux)
        parts.append(part)
    return torch.cat(parts, dim=1), None


def checked_boundaries(
    name: str,
    query_BHLD: Tensor,
    attention_mask: Tensor | None,
    boundaries: Sequence[int] | None,
    others: dict[str, Any],
) -> tuple[int, ...]:
    """The boundaries, where the attention `name` is called in a way that this project knows.

    Raises:
        UnknownAttention: see `by_sequence`.
    """
    unknown = [key for key, value in others.items() if value is not None and value is not False]
    unknown = sorted(set(unknown) - _IRRELEVANT)
    if unknown:
        raise UnknownAttention(f"{name} passes {', '.join(unknown)} to its attention")
    if attention_mask is not None:
        raise UnknownAttention(f"{name} makes its own attention mask")
    if boundaries is None:
        raise UnknownAttention(f"{name} does not hand arguments on to its attention")
    assert boundaries[0] == 0 and boundaries[-1] == query_BHLD.shape[2]
    return tuple(boundaries)


def _explicit(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    mask_LL: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux_H: Tensor | None,
) -> Tensor:
    """Attention whose scores are in memory; causal where there is no mask."""
    batch, heads, length, size = query_BHLD.shape
    groups = key_BGLD.shape[1]
    # M: the queries of all heads that share their keys and values.
    query_BGMD = query_BHLD.reshape(batch, groups, -1, size)
    scale = size**-0.5 if scaling is None else scaling
    if query_BHLD.device.type == "cpu":  # costs nothing there; a GPU has no tensor cores for it
        query_BGMD, key_BGLD = query_BGMD.float(), key_BGLD.float()
    scores_BGML = query_BGMD @ key_BGLD.transpose(2, 3)
    scores_BHLL = scores_BGML.view(batch, heads, length, length) * scale
    if softcap is not None:
        scores_BHLL = torch.tanh(scores_BHLL / softcap) * softcap
    if mask_LL is None:
        mask_LL = torch.ones(length, length, dtype=torch.bool, device=scores_BHLL.device).tril()
    scores_BHLL = scores_BHLL.masked_fill(~mask_LL, torch.finfo(scores_BHLL.dtype).min)
    if s_aux_H is not None:
        sinks = s_aux_H.reshape(1, -1, 1, 1).expand(batch, heads, length, 1)
        scores_BHLL = torch.cat([scores_BHLL, sinks.to(scores_BHLL.dtype)], dim=-1)
    weights_BHLL = scores_BHLL.softmax(-1, dtype=torch.float32).to(query_BHLD.dtype)
    if s_aux_H is not None:
        weights_BHLL = weights_BHLL[..., :-1]
    weights_BHLL = nn.functional.dropout(weights_BHLL, dropout, module.training)
    part_BGMD = weights_BHLL.reshape(batch, groups, -1, length) @ value_BGLD
    return part_BGMD.view(batch, heads, length, -1).transpose(1, 2).contiguous()


def _is_slow_in_sdpa(module: nn.Module, query_BHLD: Tensor) -> bool:
    """Whether sdpa's backward takes longer than one with the scores in memory.

    In bfloat16 on a CPU it takes three times as long at 72 tokens, as long at 256. Whether there is
    a backward depends on the mode alone: a forward pass that is repeated in it must be the same.
    """
    return (
        module.training
        and query_BHLD.device.type == "cpu"
        and query_BHLD.dtype == torch.bfloat16
        and query_BHLD.shape[2] <= SHORT
    )


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """`[L, L]`, true where a query sees a key; None where the causal mask is the same."""
    if window is None or length <= window:
        return None
    at_L = torch.arange(length, device=device)
    distance_LL = at_L[:, None] - at_L[None, :]
    return (distance_LL >= 0) & (distance_LL < window)


AttentionInterface.register(BY_SEQUENCE, by_sequence)
