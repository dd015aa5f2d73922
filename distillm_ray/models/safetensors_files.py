"""Safetensors files: a header length, a JSON header, then the tensors' bytes.

Reading headers and copying byte ranges needs no torch and keeps every bit.
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

_MAX_HEADER_BYTES = 100 * 2**20  # limit of the format
_COPY_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """The position of one tensor in a file."""

    file: Path
    dtype: str  # as in the header: BF16, F32, ...
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)


def read_tensors(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, from its header.

    Raises:
        ModelError: as in `read_header`.
    """
    return read_header(file)[1]


def read_header(file: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The metadata of one file, and its tensors.

    Raises:
        ModelError: not a safetensors file, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(size, _MAX_HEADER_BYTES):
            raise ModelError(
                f"{file} is not a safetensors file ({size} bytes): probably an incomplete download"
                " or a Git LFS pointer; download it again"
            )
        raw = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not a safetensors file: its header is not JSON") from error
    metadata: dict[str, str] = header.pop("__metadata__", {})
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
            f"{file} is incomplete: its header describes {end} bytes, the file has {size}; copy or"
            " download it again"
        )
    return metadata, tensors


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
    encoded += b" " * (-len(encoded) % 8)  # readers map the file and expect alignment to 8 bytes
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
