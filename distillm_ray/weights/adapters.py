"""A LoRA student is published by its adapters; generators add them to the weights that they have.

A weight with an adapter has two matrices in a bucket, in the orientation in which it is stored:

    weight [out, in] + scale * left [out, rank] @ right [rank, in], in float32

Everything else of the student is frozen, and the generators' model directory has it already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from distillm_ray.types import AdapterBase, Bucket
from distillm_ray.weights.buckets import BUCKET_ELEMENTS, read_tensors, to_bytes, to_tensors

LEFT, RIGHT = ".lora_left", ".lora_right"


def with_adapters(
    directory: Path,
    buckets: Iterable[Bucket],
    base: AdapterBase,
    *,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> Iterator[Bucket]:
    """Yield the weights of a model directory with the adapters added to those that have one.

    Raises:
        ValueError: an adapter of a weight that the directory does not have.
    """
    factors = {name: tensor for bucket in buckets for name, tensor in to_tensors(bucket)}
    trained, published = getattr(torch, base.trained), getattr(torch, base.published)
    whole: Bucket = {}
    filled = 0
    for name, tensor in read_tensors(directory):
        if whole and filled + tensor.numel() > bucket_elements:
            yield whole
            whole, filled = {}, 0
        filled += tensor.numel()
        if tensor.is_floating_point():
            tensor = tensor.to(trained)
        left, right = factors.pop(name + LEFT, None), factors.pop(name + RIGHT, None)
        if left is not None and right is not None:
            tensor = tensor.float() + base.scale * (left.float() @ right.float())
        whole[name] = to_bytes(tensor, published)
    if factors:
        raise ValueError(f"{directory} has no weight for the adapter {min(factors)}")
    yield whole
