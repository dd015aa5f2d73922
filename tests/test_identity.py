"""The identity of a model: its config and its values, not where or how they are stored."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillm_ray.models.identity import SAMPLE_BYTES, model_identity

LARGE = 4 * SAMPLE_BYTES  # float32 values: 16 samples long


def write_model(directory: Path, shards: list[list[str]]) -> Path:
    """A directory with a small and a large tensor, one safetensors file for each list of names."""
    tensors = {
        "small": np.arange(6, dtype=np.float32).reshape(2, 3),
        "large": np.arange(LARGE, dtype=np.float32),
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"hidden_size": 3, "rope_theta": 1e4}))
    for index, names in enumerate(shards, start=1):
        save_file(
            {name: tensors[name] for name in names},
            directory / f"model-{index:05}-of-{len(shards):05}.safetensors",
        )
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", [["small", "large"]])


def overwrite(directory: Path, name: str, values: np.ndarray) -> None:
    """Replace one tensor of a model in a single file."""
    (file,) = directory.glob("*.safetensors")
    save_file(load_file(file) | {name: values}, file)


def test_a_copy_elsewhere_with_other_times_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    for file in copy.iterdir():
        os.utime(file, (0, 0))
    (copy / "README.md").write_text("about the model")
    assert model_identity(copy) == model_identity(model)


def test_how_tensors_are_spread_over_files_does_not_matter(model: Path, tmp_path: Path) -> None:
    sharded = write_model(tmp_path / "sharded", [["large"], ["small"]])
    assert model_identity(sharded) == model_identity(model)


def test_any_value_of_a_small_tensor_matters(model: Path) -> None:
    seen = {model_identity(model)}
    for index in range(6):
        values = np.arange(6, dtype=np.float32)
        values[index] += 0.5
        overwrite(model, "small", values.reshape(2, 3))
        seen.add(model_identity(model))
    assert len(seen) == 7


@pytest.mark.parametrize("index", [0, LARGE // 2, LARGE - 1])
def test_start_middle_and_end_of_a_large_tensor_matter(model: Path, index: int) -> None:
    before = model_identity(model)
    values = np.arange(LARGE, dtype=np.float32)
    values[index] += 0.5
    overwrite(model, "large", values)
    assert model_identity(model) != before


def test_the_same_bytes_under_another_shape_dtype_or_name_are_another_model(model: Path) -> None:
    small = np.arange(6, dtype=np.float32)
    seen = {model_identity(model)}
    for values in (small.reshape(3, 2), small.view(np.int32).reshape(2, 3)):
        overwrite(model, "small", values)
        seen.add(model_identity(model))
    overwrite(model, "small", small.reshape(2, 3))
    (file,) = model.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"small"', b'"smell"'))
    seen.add(model_identity(model))
    assert len(seen) == 4


def test_a_changed_key_of_the_config_matters(model: Path) -> None:
    before = model_identity(model)
    (model / "config.json").write_text(json.dumps({"hidden_size": 3, "rope_theta": 1e6}))
    assert model_identity(model) != before


def test_the_code_that_a_model_brings_matters(model: Path) -> None:
    before = model_identity(model)
    (model / "modeling_own.py").write_text("scale = 1\n")
    with_code = model_identity(model)
    (model / "modeling_own.py").write_text("scale = 2\n")
    assert len({before, with_code, model_identity(model)}) == 3
