"""Buckets of weights as tensors and as files, for those who receive them: no training library.

A bucket is `dict[name, (shape, dtype name, uint8 array)]`, which Ray hands over without a copy and
which needs neither torch nor a pickle to be understood.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Bucket: TypeAlias = dict[str, tuple[tuple[int, ...], str, NDArray[np.uint8]]]


def to_tensors(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket, copied: the arrays may be read-only views of shared memory."""
    for name, (shape, dtype_name, values) in bucket.items():
        flat = torch.from_numpy(values.copy()).view(dtype_of(dtype_name))
        yield name, flat.reshape(shape)


def receive(buckets: Iterable[Bucket], directory: Path) -> Path:
    """Write buckets as safetensors files, one each, as they come; returns `directory`.

    Meant for a directory in node-local memory, which an engine's worker processes read with
    `read`. What the directory held before is replaced; it is never seen half-written.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for index, bucket in enumerate(buckets):
        save_file(dict(to_tensors(bucket)), partial / f"weights-{index:05d}.safetensors")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return directory


def read(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """What `receive` wrote, tensor by tensor."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, not a dictionary)
                yield name, file.get_tensor(name)


def dtype_of(name: str) -> torch.dtype:
    """`"bfloat16"` to `torch.bfloat16`."""
    dtype = vars(torch)[name]
    assert isinstance(dtype, torch.dtype), f"{name} is no dtype"
    return dtype
