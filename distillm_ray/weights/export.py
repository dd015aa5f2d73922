"""Export a trained student as a model directory that transformers and vLLM load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from distillm_ray.files import new_directory
from distillm_ray.types import Bucket
from distillm_ray.weights.buckets import write_buckets

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_SPECIAL = ("bos_token_id", "pad_token_id")  # keys of both configs, besides the end token


def export_model(
    buckets: Iterable[Bucket],
    student: Path,
    directory: Path,
    dtype: torch.dtype,
    *,
    end_token_ids: Sequence[int],
) -> None:
    """Write `buckets` and the config, tokenizer and generation settings of `student`.

    An earlier export in `directory` is replaced once the new one is complete.

    Args:
        dtype: of the weights in `buckets`; written to `config.json`.
        end_token_ids: at which the trained model ends its responses. Written to both configs,
            because the student's own may lack the end token of the data's template: transformers
            and vLLM would then generate up to the length limit.
    """
    with new_directory(directory, replace=True) as new:
        write_buckets(buckets, new)
        for path in sorted(student.iterdir()):
            if _is_copied(path):
                shutil.copy(path, new / path.name)
        ends = list(end_token_ids) if len(end_token_ids) > 1 else end_token_ids[0]
        _update(new / "config.json", eos_token_id=ends, dtype=str(dtype).removeprefix("torch."))
        generation = new / "generation_config.json"
        if not generation.exists():
            # Once the file exists, nothing is taken from config.json any more.
            values = json.loads((new / "config.json").read_text(encoding="utf-8"))
            _update(
                generation, **{key: values[key] for key in _SPECIAL if values.get(key) is not None}
            )
        _update(generation, eos_token_id=ends)


def _is_copied(path: Path) -> bool:
    """Exclude weights, their index, and the model card, which describes the original model."""
    weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
    return path.is_file() and not weights and path.name != "README.md"


def _update(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file, which may not exist yet."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    values.pop("torch_dtype", None)  # the former name of `dtype`
    path.write_text(json.dumps(values | changes, indent=2) + "\n", encoding="utf-8")
