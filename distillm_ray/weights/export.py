"""The model directory that a run leaves behind: plain transformers and plain vLLM load it as is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from distillm_ray.weights.files import Bucket, to_tensors

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def export_model(
    buckets: Iterable[Bucket], student: Path, directory: Path, dtype: torch.dtype
) -> None:
    """Write `buckets` with the configuration, tokenizer and generation settings of `student`.

    An earlier export in `directory` is replaced when the new one is complete.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_weights(buckets, partial)
    for path in sorted(student.iterdir()):
        if _is_copied(path):
            shutil.copy(path, partial / path.name)
    _set_dtype(partial / "config.json", dtype)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def write_weights(buckets: Iterable[Bucket], directory: Path) -> None:
    """One safetensors file a bucket; an index beside them if there are several."""
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


def _is_copied(path: Path) -> bool:
    """Everything but weights, their index, and the model card, which describes another model."""
    weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
    return path.is_file() and not weights and path.name != "README.md"


def _set_dtype(config_path: Path, dtype: torch.dtype) -> None:
    """The exported weights' dtype, which engines take as their default."""
    values = json.loads(config_path.read_text())
    values.pop("torch_dtype", None)
    values["dtype"] = str(dtype).removeprefix("torch.")
    config_path.write_text(json.dumps(values, indent=2) + "\n")
