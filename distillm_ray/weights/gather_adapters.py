"""Gather a student's adapters alone, as `adapters.py` adds them to a model directory's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from distillm_ray.models.partitioned import whole
from distillm_ray.types import Bucket
from distillm_ray.weights.adapters import LEFT, RIGHT
from distillm_ray.weights.buckets import BUCKET_ELEMENTS, tensor_names, to_bytes
from distillm_ray.weights.gather import adapters_of


def adapted_weights(model: PreTrainedModel, directory: Path) -> dict[str, str]:
    """The weights of the directory that the model's adapters change, by module.

    Empty if the model has no adapters, or if one of these weights is not in the files under the
    name by which transformers would save it: a generator could not tell what to add the adapter to.
    """
    found: dict[str, str] = {}
    adapted = adapters_of(model)
    stored = tensor_names(directory) if adapted else set()
    for module in adapted:
        placeholder = torch.empty((1, 1), device="meta")
        names = list(revert_weight_conversion(model, {f"{module}.weight": placeholder}))
        if len(names) != 1 or names[0] not in stored:
            return {}
        found[module] = names[0]
    return found


def gather_adapters(
    model: PreTrainedModel, weights: Mapping[str, str], *, keep: bool
) -> Iterator[Bucket]:
    """Yield the adapters under any ZeRO stage, in the dtype in which they are trained.

    A collective, like `gather`: every rank must iterate to the end. Ranks without `keep` get empty
    buckets.

    Args:
        weights: from `adapted_weights`.
    """
    adapters = adapters_of(model)
    bucket: Bucket = {}
    filled = 0
    for module, name in weights.items():
        layer = adapters[module]
        parameters = [one for key, one in layer.named_parameters() if "lora_" in key]
        with whole(parameters), torch.no_grad():
            for key, factor in zip((LEFT, RIGHT), _factors(layer), strict=True):
                filled += factor.numel()
                if keep:
                    bucket[name + key] = to_bytes(factor, factor.dtype)
        if filled > BUCKET_ELEMENTS:
            yield bucket
            bucket, filled = {}, 0
    yield bucket


def _factors(layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """Left and right."""
    (active,) = layer.active_adapters
    down = layer.lora_A[active].get_parameter("weight")
    up = layer.lora_B[active].get_parameter("weight")
    # A Conv1D's weight is stored as [in, out].
    return (down.T, up.T) if layer.fan_in_fan_out else (up, down)
