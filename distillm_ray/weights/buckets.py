"""Buckets of weights as tensors and as safetensors files, for generators and the export.

`types.Bucket` describes the format. Names are those of the Hugging Face checkpoint, which may
differ from the module names of transformers. A tied weight appears once. LoRA adapters are merged
into the weights that they adapt, or stand alone (adapters.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distillm_ray.types import Bucket

BUCKET_ELEMENTS = 20_000_000
"""Largest number of elements in a bucket. A larger tensor gets a bucket of its own."""


def to_bytes(tensor: Tensor, dtype: torch.dtype) -> tuple[tuple[int, ...], str, NDArray[np.uint8]]:
    """The entry of a bucket: a copy in main memory. Integers keep their type."""
    target = dtype if tensor.is_floating_point() else tensor.dtype
    flat = tensor.detach().to(device="cpu", dtype=target, copy=True).contiguous().reshape(-1)
    return (
        tuple(tensor.shape),
        str(target).removeprefix("torch."),
        flat.view(torch.uint8).numpy(),
    )


def to_tensors(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a bucket by name.

    They are copies: the arrays may be read-only views of shared memory.
    """
    for name, (shape, dtype_name, values) in bucket.items():
        dtype = getattr(torch, dtype_name)
        yield name, torch.from_numpy(values.copy()).view(dtype).reshape(shape)


def write_buckets(buckets: Iterable[Bucket], directory: Path) -> None:
    """Write each bucket as one safetensors file, and an index if there are several.

    The result is the weights of a model directory that transformers and vLLM load.
    """
    weight_map: dict[str, str] = {}
    total_bytes = 0
    paths = []
    for index, bucket in enumerate(buckets):
        path = directory / f"model-{index + 1:05d}.safetensors"
        save_file(dict(to_tensors(bucket)), path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(bucket, path.name)
        total_bytes += sum(values.nbytes for _, _, values in bucket.values())
        paths.append(path)
    if len(paths) == 1:
        paths[0].rename(directory / "model.safetensors")
        return
    index_text = json.dumps(
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2
    )
    (directory / "model.safetensors.index.json").write_text(index_text)


def tensor_names(directory: Path) -> set[str]:
    """The tensors of a model directory."""
    names: set[str] = set()
    for path in _weight_files(directory):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model directory, one at a time."""
    for path in _weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, not a dictionary)
                yield name, file.get_tensor(name)


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers would load: others may hold a second set of weights."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [directory / name for name in sorted(named)]
    whole = directory / "model.safetensors"
    return [whole] if whole.exists() else sorted(directory.glob("*.safetensors"))
