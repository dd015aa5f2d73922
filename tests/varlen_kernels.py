"""Stand-ins on the CPU for the kernels behind `torch.nn.attention.varlen`, for which it has none.

They take the place of `aten::_flash_attention_forward` and `_flash_attention_backward`, so that
PyTorch's own function, its checks and its autograd formula run above them. They compute in any
dtype, from the kernels' documented arguments, and check what the CUDA code checks.

Axes: L packed tokens, H heads, G heads of keys and values, D size of a head, S sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Kernels:
    """What was launched, and how the kernels are wrong, if they are."""

    forward: list[dict[str, Any]] = field(default_factory=list)
    backward: list[dict[str, Any]] = field(default_factory=list)
    ignore_starts: bool = False
    scale_factor: float = 1.0
    window_in_backward: bool = True
    fails: str = ""


@contextmanager
def installed() -> Iterator[Kernels]:
    """The stand-ins, for the CPU, until the end of the block."""
    kernels = Kernels()
    library = torch.library.Library("aten", "IMPL")

    def forward(
        query_LHD: Tensor,
        key_LGD: Tensor,
        value_LGD: Tensor,
        starts_S: Tensor,
        key_starts_S: Tensor,
        longest: int,
        longest_key: int,
        dropout: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        assert dropout == 0 and not return_debug_mask
        assert all(value is None for value in others.values())
        _check(query_LHD, key_LGD, value_LGD, starts_S, key_starts_S, longest, longest_key)
        if kernels.fails:
            raise RuntimeError(kernels.fails)
        window = _window(window_size_left, window_size_right, is_causal)
        kernels.forward.append({"starts": starts_S.tolist(), "window": window, "scale": scale})
        factor = _factor(query_LHD, scale) * kernels.scale_factor
        output_LHD = torch.empty_like(query_LHD)
        lse_HL = torch.empty(query_LHD.shape[1], len(query_LHD))
        for part, mask in _parts(starts_S, window, kernels.ignore_starts):
            scores_HLL = _scores(query_LHD[part], key_LGD[part], mask, factor)
            value_HLD = _spread(value_LGD[part], query_LHD)
            output_LHD[part] = (scores_HLL.softmax(-1) @ value_HLD).transpose(0, 1)
            lse_HL[:, part] = scores_HLL.logsumexp(-1)
        state = torch.zeros(2, dtype=torch.uint64)
        return output_LHD, lse_HL, state, state.clone(), torch.empty(0)

    def backward(
        gradient_LHD: Tensor,
        query_LHD: Tensor,
        key_LGD: Tensor,
        value_LGD: Tensor,
        output_LHD: Tensor,
        lse_HL: Tensor,
        starts_S: Tensor,
        key_starts_S: Tensor,
        longest: int,
        longest_key: int,
        dropout: float,
        is_causal: bool,
        _seed: Tensor,
        _offset: Tensor,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert dropout == 0
        _check(query_LHD, key_LGD, value_LGD, starts_S, key_starts_S, longest, longest_key)
        window = _window(window_size_left, window_size_right, is_causal)
        kernels.backward.append({"starts": starts_S.tolist(), "window": window, "scale": scale})
        if not kernels.window_in_backward:
            window = (-1, -1)
        query_grad, key_grad, value_grad = (
            torch.empty_like(one) for one in (query_LHD, key_LGD, value_LGD)
        )
        groups = key_LGD.shape[1]
        factor = _factor(query_LHD, scale) * kernels.scale_factor
        for part, mask in _parts(starts_S, window, kernels.ignore_starts):
            query_HLD = query_LHD[part].transpose(0, 1)
            key_HLD, value_HLD = (_spread(one[part], query_LHD) for one in (key_LGD, value_LGD))
            scores_HLL = _scores(query_LHD[part], key_LGD[part], mask, factor)
            weights_HLL = scores_HLL.softmax(-1)
            gradient_HLD = gradient_LHD[part].transpose(0, 1)
            of_weights_HLL = gradient_HLD @ value_HLD.transpose(1, 2)
            mean_HL1 = (of_weights_HLL * weights_HLL).sum(-1, keepdim=True)
            of_scores_HLL = weights_HLL * (of_weights_HLL - mean_HL1) * factor
            query_grad[part] = (of_scores_HLL @ key_HLD).transpose(0, 1)
            key_grad[part] = _gather(of_scores_HLL.transpose(1, 2) @ query_HLD, groups)
            value_grad[part] = _gather(weights_HLL.transpose(1, 2) @ gradient_HLD, groups)
        return query_grad, key_grad, value_grad

    try:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield kernels
    finally:
        library._destroy()


def _check(
    query_LHD: Tensor,
    key_LGD: Tensor,
    value_LGD: Tensor,
    starts_S: Tensor,
    key_starts_S: Tensor,
    longest: int,
    longest_key: int,
) -> None:
    """What `mha_varlen_fwd` and `mha_varlen_bwd` of PyTorch check, dtype and device left out."""
    length, heads, size = query_LHD.shape
    groups = key_LGD.shape[1]
    assert key_LGD.shape == value_LGD.shape == (length, groups, size)
    assert heads % groups == 0 and size % 8 == 0 and size <= 256
    assert query_LHD.dtype == key_LGD.dtype == value_LGD.dtype
    assert all(one.stride(-1) == 1 for one in (query_LHD, key_LGD, value_LGD))
    assert starts_S.dtype == torch.int32 and starts_S.is_contiguous()
    assert torch.equal(starts_S, key_starts_S)
    assert starts_S[0] == 0 and starts_S[-1] == length
    assert longest == longest_key == starts_S.diff().max()


def _window(left: int | None, right: int | None, is_causal: bool) -> tuple[int, int]:
    return (-1 if left is None else left, 0 if is_causal else -1 if right is None else right)


def _factor(query_LHD: Tensor, scale: float | None) -> float:
    return query_LHD.shape[-1] ** -0.5 if scale is None else scale


def _parts(
    starts_S: Tensor, window: tuple[int, int], whole: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Each sequence with `[L, L]`, true where a query sees a key."""
    starts = starts_S.tolist()
    for start, end in itertools.pairwise([starts[0], starts[-1]] if whole else starts):
        at_L = torch.arange(end - start)
        ahead_LL = at_L[None, :] - at_L[:, None]
        left, right = window
        mask_LL = torch.ones_like(ahead_LL, dtype=torch.bool)
        if left >= 0:
            mask_LL &= ahead_LL >= -left
        if right >= 0:
            mask_LL &= ahead_LL <= right
        yield slice(start, end), mask_LL


def _scores(query_LHD: Tensor, key_LGD: Tensor, mask_LL: Tensor, factor: float) -> Tensor:
    """`[H, L, L]`, minus infinity where a query does not see a key."""
    key_HLD = _spread(key_LGD, query_LHD)
    scores_HLL = query_LHD.transpose(0, 1) @ key_HLD.transpose(1, 2) * factor
    return scores_HLL.masked_fill(~mask_LL, float("-inf"))


def _spread(tensor_LGD: Tensor, query_LHD: Tensor) -> Tensor:
    """`[H, L, D]`: each head of keys and values for all its heads of queries."""
    times = query_LHD.shape[1] // tensor_LGD.shape[1]
    return tensor_LGD.repeat_interleave(times, dim=1).transpose(0, 1)


def _gather(tensor_HLD: Tensor, groups: int) -> Tensor:
    """`[L, G, D]`: the sum over the heads of queries that share one of keys and values."""
    return tensor_HLD.unflatten(0, (groups, -1)).sum(1).transpose(0, 1)
