"""The layout of safetensors files: a length, a JSON header, then the tensors' bytes.

Reading headers and copying byte ranges needs no torch, takes milliseconds, and keeps every bit.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillm_ray.errors import ModelError

_MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
_COPY_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies."""

    file: Path
    dtype: str  # as in the header: BF16, F32, ...
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


def read_tensors(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, from its header.

    Raises:
        ModelError: not a safetensors file, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(size, _MAX_HEADER_BYTES):
            raise ModelError(
                f"{file} is not a safetensors file ({size} bytes): a download that was cut off, or"
                " a pointer to large-file storage"
            )
        raw = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not a safetensors file: its header is no JSON") from error
    header.pop("__metadata__", None)
    tensors = {
        name: TensorInfo(
            file=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=8 + length + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
    end = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=0)
    if end > size:
        raise ModelError(
            f"{file} is cut off: its header describes {end} bytes, the file has {size}; copy or"
            " download it again"
        )
    return tensors


def write_tensors(file: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Copy `tensors`, under the mapping's names, into the new file `file`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers map the tensors, aligned to 8 bytes
    with file.open("xb") as out:
        out.write(struct.pack("<Q", len(encoded)))
        out.write(encoded)
        for tensor in tensors.values():
            with tensor.file.open("rb") as source:
                source.seek(tensor.start)
                left = tensor.num_bytes
                while left:
                    chunk = source.read(min(left, _COPY_BYTES))
                    assert chunk, f"{tensor.file} became shorter while it was read"
                    out.write(chunk)
                    left -= len(chunk)
