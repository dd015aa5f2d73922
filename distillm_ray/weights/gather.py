"""Gather a student's weights from the learners' ranks, in buckets (`types.Bucket`)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from distillm_ray.models.partitioned import whole, whole_shape
from distillm_ray.types import Bucket
from distillm_ray.weights.buckets import BUCKET_ELEMENTS, to_bytes

EXPORT_ELEMENTS = 1_000_000_000
"""The same for the files of an exported model."""

_ADAPTED = ".base_layer"  # peft inserts it into the names of adapted weights


def gather(
    model: PreTrainedModel,
    dtype: torch.dtype,
    *,
    keep: bool,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> Iterator[Bucket]:
    """Yield the weights of a Hugging Face model under any ZeRO stage, bucket by bucket.

    Names and shapes are those of the checkpoint, as `save_pretrained` writes it. transformers may
    rename tensors when it loads them, and it keeps all experts of a layer in one tensor.

    A collective: every rank must iterate to the end. Memory beyond the model's own is one gathered
    bucket and its copy, and a second copy of one layer's experts.

    Args:
        dtype: floating-point tensors are converted to it.
        keep: whether this rank gets tensors; otherwise its buckets are empty.
    """
    adapters = adapters_of(model)
    for names in _plan(model, bucket_elements):
        tensors = _tensors(model)
        involved = [tensors[name] for name in names]
        for name in names:
            if (layer := adapters.get(_adapted_module(name))) is not None:
                involved += layer.parameters()
        unique = list({id(tensor): tensor for tensor in involved}.values())
        with whole(unique), torch.no_grad():
            bucket: Bucket = {}
            for name in names if keep else ():
                merged = _merged(tensors[name], adapters.get(_adapted_module(name)))
                # One at a time is enough: no causal LM builds a tensor of its checkpoint from
                # several of its own.
                plain_name = name.replace(_ADAPTED, "")
                stored = revert_weight_conversion(model, {plain_name: merged})
                bucket |= {key: to_bytes(tensor, dtype) for key, tensor in stored.items()}
        yield bucket


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name: tied ones once, no adapters."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if "lora_" in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        found[name] = tensor
    return found


def _plan(model: nn.Module, bucket_elements: int) -> list[list[str]]:
    """Split the tensor names into buckets, identically on every rank: it uses full sizes."""
    plan: list[list[str]] = [[]]
    filled = 0
    for name, tensor in _tensors(model).items():
        size = math.prod(whole_shape(tensor))
        if plan[-1] and filled + size > bucket_elements:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan


def adapters_of(model: nn.Module) -> dict[str, LoraLinear]:
    """Return peft's LoRA layers by module name."""
    return {name: one for name, one in model.named_modules() if isinstance(one, LoraLinear)}


def _adapted_module(name: str) -> str:
    """Map `a.b.base_layer.weight` to `a.b`, and a weight without an adapter to ''."""
    return name.removesuffix(f"{_ADAPTED}.weight") if name.endswith(f"{_ADAPTED}.weight") else ""


def _merged(tensor: Tensor, adapter: LoraLinear | None) -> Tensor:
    """Return the weight with its adapter's update added, in float32."""
    if adapter is None:
        return tensor.detach()
    delta = sum(adapter.get_delta_weight(active).float() for active in adapter.active_adapters)
    return tensor.detach().float() + delta
