"""A digest that says whether two model directories hold the same model, without reading all of it.

Teacher targets are addressed by it: a teacher with other weights must not find the targets of this
one, and a copy of the directory on another node must.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from distillm_ray.models.safetensors_files import TensorInfo, read_tensors

SAMPLE_BYTES = 4096  # read at the start, the middle and the end of each tensor


def model_identity(path: Path) -> str:
    """Digest of a model directory: `config.json`, own code, tensor headers and sampled values.

    It does not depend on the directory's place, on modification times, or on how the tensors are
    spread over safetensors files. Training changes values all over a tensor, so a fine-tuned copy
    differs in the samples. A single edited value in a tensor of more than 3 * `SAMPLE_BYTES` bytes
    may lie between them and stay unnoticed.

    Args:
        path: a directory that `check_model_directory` has accepted.

    Raises:
        ModelError: a safetensors file is damaged.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in (path / "config.json", *sorted(path.glob("*.py"))):
        _add(digest, file.name.encode())
        _add(digest, file.read_bytes())
    tensors = [
        (name, tensor)
        for file in sorted(path.glob("*.safetensors"))
        for name, tensor in read_tensors(file).items()
    ]
    streams = {file: file.open("rb") for file in {tensor.file for _, tensor in tensors}}
    try:
        for name, tensor in sorted(tensors, key=lambda item: (item[0], item[1].file.name)):
            _add(digest, json.dumps([name, tensor.dtype, tensor.shape]).encode())
            _add(digest, _sample(streams[tensor.file], tensor))
    finally:
        for stream in streams.values():
            stream.close()
    return digest.hexdigest()


def _sample(stream: BinaryIO, tensor: TensorInfo) -> bytes:
    """All bytes of a small tensor; start, middle and end of a large one."""
    if tensor.num_bytes <= 3 * SAMPLE_BYTES:
        stream.seek(tensor.start)
        return stream.read(tensor.num_bytes)
    last = tensor.num_bytes - SAMPLE_BYTES
    parts = []
    for offset in (0, last // 2, last):
        stream.seek(tensor.start + offset)
        parts.append(stream.read(SAMPLE_BYTES))
    return b"".join(parts)


def _add(digest: hashlib.blake2b, part: bytes) -> None:
    """Length first, so that no two sequences of parts give the same bytes."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)
