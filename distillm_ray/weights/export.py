"""Export a trained student as a model directory that transformers and vLLM load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from distillm_ray.files import new_directory
from distillm_ray.types import Bucket
from distillm_ray.weights.buckets import write_buckets

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def export_model(
    buckets: Iterable[Bucket], student: Path, directory: Path, dtype: torch.dtype
) -> None:
    """Write `buckets` and the config, tokenizer and generation settings of `student`.

    An earlier export in `directory` is replaced once the new one is complete.

    Args:
        dtype: of the weights in `buckets`; written to `config.json`.
    """
    with new_directory(directory, replace=True) as new:
        write_buckets(buckets, new)
        for path in sorted(student.iterdir()):
            if _is_copied(path):
                shutil.copy(path, new / path.name)
        _set_dtype(new / "config.json", dtype)


def _is_copied(path: Path) -> bool:
    """Exclude weights, their index, and the model card, which describes the original model."""
    weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
    return path.is_file() and not weights and path.name != "README.md"


def _set_dtype(config_path: Path, dtype: torch.dtype) -> None:
    """Set the dtype in which engines load the model by default."""
    values = json.loads(config_path.read_text())
    values.pop("torch_dtype", None)
    values["dtype"] = str(dtype).removeprefix("torch.")
    config_path.write_text(json.dumps(values, indent=2) + "\n")
