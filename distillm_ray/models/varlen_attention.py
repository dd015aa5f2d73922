"""Attention of packed rows on a GPU, a whole row in one kernel.

`torch.nn.attention.varlen` calls the FlashAttention kernels that PyTorch brings. They take the
starts of the sequences, so that a row costs the sum of the squares of the sequences' lengths, with
one launch a layer. They know causal attention, windows and grouped heads; they know no soft cap, no
sinks and no dropout.

Axes: L packed tokens; B = 1 row, H heads, G heads of keys and values, D size of a head,
S sequences.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from distillm_ray.models.packed_attention import (
    UnknownAttention,
    by_sequence,
    checked_boundaries,
)

VARLEN = "varlen"
DTYPES = (torch.bfloat16, torch.float16)
COMPUTE_CAPABILITY = (8, 0)  # Ampere
MAX_HEAD_SIZE, HEAD_SIZE_STEP = 256, 8


def why_not_varlen(device: torch.device, dtype: torch.dtype) -> str:
    """The rule of the kernels that a GPU or a dtype breaks; empty: there is none."""
    if dtype not in DTYPES:
        return f"{VARLEN}: needs bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < COMPUTE_CAPABILITY:
        return f"{VARLEN}: needs a GPU of compute capability 8.0, got {major}.{minor}"
    return ""


def varlen(
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
    """Returns `[B, L, H, D]`; the arguments are those of `by_sequence`.

    Dropout, which a student's config may ask for in training, runs one sequence at a time.

    Raises:
        UnknownAttention: as `by_sequence`, and for what the kernels do not compute.
    """
    name = type(module).__name__
    boundaries = checked_boundaries(name, query_BHLD, attention_mask, boundaries, others)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if softcap is not None:
        raise UnknownAttention(f"{name} caps its scores, and the kernel does not")
    if s_aux is not None:
        raise UnknownAttention(f"{name} has attention sinks, and the kernel has none")
    if not causal:
        raise UnknownAttention(f"{name} is not causal")
    if dropout > 0:
        return by_sequence(
            module,
            query_BHLD,
            key_BGLD,
            value_BGLD,
            None,
            boundaries=boundaries,
            sliding_window=sliding_window,
            scaling=scaling,
            dropout=dropout,
            is_causal=is_causal,
        )
    query_size, value_size = query_BHLD.shape[-1], value_BGLD.shape[-1]
    size = -(-max(query_size, value_size) // HEAD_SIZE_STEP) * HEAD_SIZE_STEP
    if size > MAX_HEAD_SIZE:
        raise UnknownAttention(
            f"{name} has heads of {size} values, and the kernel takes at most {MAX_HEAD_SIZE}"
        )
    starts_S = _starts(boundaries, query_BHLD.device)
    longest = max(end - start for start, end in itertools.pairwise(boundaries))
    output_LHD = varlen_attn(
        _rows(query_BHLD, size),
        _rows(key_BGLD, size),
        _rows(value_BGLD, size),
        starts_S,
        starts_S,
        longest,
        longest,
        scale=query_size**-0.5 if scaling is None else scaling,
        # The kernel counts the tokens before a query; transformers counts the query too.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(output_LHD, Tensor)
    return output_LHD[None, :, :, :value_size], None


def _rows(tensor_BHLD: Tensor, size: int) -> Tensor:
    """`[L, H, size]`. Zeros behind a head change neither its scores nor its values."""
    rows_LHD = tensor_BHLD[0].transpose(0, 1)
    missing = size - rows_LHD.shape[-1]
    return nn.functional.pad(rows_LHD, (0, missing)) if missing else rows_LHD


@functools.lru_cache(maxsize=8)
def _starts(boundaries: tuple[int, ...], device: torch.device) -> Tensor:
    """`[S + 1]`. Cached: all layers of a row share one copy to the device."""
    with torch.inference_mode(False):  # a later backward pass may need it
        return torch.tensor(boundaries, dtype=torch.int32, device=device)


AttentionInterface.register(VARLEN, varlen)
