"""Student weights on their way out of the learners, in buckets (files.py has the format).

Names are those of the Hugging Face checkpoint: tied weights appear once, LoRA adapters are merged
into the weights that they adapt.
"""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from distillm_ray.weights.files import Bucket

BUCKET_ELEMENTS = 20_000_000
"""A bucket is full at so many elements. A larger tensor has a bucket of its own."""

_ADAPTED = ".base_layer"


def gather(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    keep: bool,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> Iterator[Bucket]:
    """The weights of a Hugging Face model under any ZeRO stage, bucket by bucket.

    A collective: all ranks iterate to the end, but only those with `keep` get tensors, the others
    get empty buckets. Memory beyond the model's is one gathered bucket and its copy.
    Floating-point tensors are converted to `dtype`.
    """
    adapters = _adapters(model)
    for names in _plan(model, bucket_elements):
        tensors = _tensors(model)
        involved = [tensors[name] for name in names]
        for name in names:
            if (layer := adapters.get(_adapted_module(name))) is not None:
                involved += layer.parameters()
        unique = list({id(tensor): tensor for tensor in involved}.values())
        with deepspeed.zero.GatheredParameters(unique), torch.no_grad():
            bucket = {
                name.replace(_ADAPTED, ""): _to_bytes(
                    _merged(tensors[name], adapters.get(_adapted_module(name))),
                    dtype,
                )
                for name in names
                if keep
            }
        yield bucket


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied ones once, adapters left out."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if "lora_" in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        found[name] = tensor
    return found


def _plan(model: nn.Module, bucket_elements: int) -> list[list[str]]:
    """The same buckets on every rank: full sizes are known where the values are partitioned."""
    plan: list[list[str]] = [[]]
    filled = 0
    for name, tensor in _tensors(model).items():
        size = _full_size(tensor)
        if plan[-1] and filled + size > bucket_elements:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan


def _adapters(model: nn.Module) -> dict[str, nn.Module]:
    """peft's layers by name. They are LoraLayers beside being modules."""
    modules = dict(model.named_modules())
    return {name: modules[name] for name in modules if isinstance(modules[name], LoraLayer)}


def _full_size(tensor: Tensor) -> int:
    """Elements of a parameter; under ZeRO-3 its own shape is empty."""
    return tensor.ds_numel if hasattr(tensor, "ds_numel") else tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]


def _adapted_module(name: str) -> str:
    """`a.b.base_layer.weight` to `a.b`; a weight without an adapter has none by that name."""
    return name.removesuffix(f"{_ADAPTED}.weight") if name.endswith(f"{_ADAPTED}.weight") else ""


def _merged(tensor: Tensor, adapter: nn.Module | None) -> Tensor:
    """The weight with its adapter added, in float32."""
    if adapter is None:
        return tensor.detach()
    assert isinstance(adapter, LoraLinear)
    delta = sum(adapter.get_delta_weight(active).float() for active in adapter.active_adapters)
    return tensor.detach().float() + delta


def _to_bytes(tensor: Tensor, dtype: torch.dtype) -> tuple[tuple[int, ...], str, NDArray[np.uint8]]:
    target = dtype if tensor.is_floating_point() else tensor.dtype
    flat = tensor.detach().to(device="cpu", dtype=target, copy=True).contiguous().reshape(-1)
    return (
        tuple(tensor.shape),
        str(target).removeprefix("torch."),
        flat.view(torch.uint8).numpy(),
    )
