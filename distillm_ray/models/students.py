"""A student made of some of the teacher's layers, tensor for tensor.

Supports every decoder that stores its layers as `model.layers.N.` or `transformer.h.N.`. It copies
bytes between safetensors files: no torch, any dtype, and no more memory than a copy buffer.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillm_ray.errors import ModelError
from distillm_ray.files import new_directory
from distillm_ray.models.directory import ModelFacts, check_model_directory
from distillm_ray.models.safetensors_files import TensorInfo, write_tensors

_LAYER_NAME = re.compile(r"^((?:model\.layers|(?:transformer\.)?h)\.)(\d+)(\..+)$")
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
LAYERS_FILE = "layers.json"
"""In a student's directory, where its layers were chosen: which are kept, and why."""
_NOT_COPIED = ("config.json", "model.safetensors.index.json", LAYERS_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSummary:
    """What `init_student` wrote."""

    path: Path
    layers: tuple[int, ...]
    num_parameters: int
    num_teacher_parameters: int


def init_student(
    teacher: Path, out: Path, layers: Sequence[int], *, trust_remote_code: bool = False
) -> StudentSummary:
    """Write a model directory with the teacher's embeddings, head and the named layers, in order.

    `out` is written completely or not at all.

    Raises:
        ModelError: `out` exists; the teacher is unusable or names its layers differently; a layer
            number is out of range or repeated; or the config has a rule by layer number that
            cannot be carried over.
    """
    if out.exists():
        raise ModelError(f"{out} exists: name a new directory, or remove it first")
    facts = check_model_directory(teacher, "teacher", trust_remote_code=trust_remote_code)
    chosen = _check_layers(layers, facts)
    tensors = _select_tensors(facts, chosen)
    config = _select_config(facts, chosen)
    with new_directory(out) as directory:
        for pattern in _COPIED:
            for file in teacher.glob(pattern):
                if file.name not in _NOT_COPIED:
                    shutil.copyfile(file, directory / file.name)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(directory / "model.safetensors", tensors)
    return StudentSummary(
        path=out,
        layers=chosen,
        num_parameters=sum(tensor.num_elements for tensor in tensors.values()),
        num_teacher_parameters=facts.num_parameters,
    )


def _check_layers(layers: Sequence[int], facts: ModelFacts) -> tuple[int, ...]:
    if not layers:
        raise ModelError("layers must name at least one of the teacher's layers, got none")
    wrong = sorted({layer for layer in layers if not 0 <= layer < facts.num_layers})
    if wrong:
        raise ModelError(
            f"layers must lie between 0 and {facts.num_layers - 1}, got"
            f" {', '.join(map(str, wrong))}: {facts.path} has {facts.num_layers} layers"
        )
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ModelError(f"layers must differ, got {', '.join(map(str, repeated))} repeatedly")
    return tuple(layers)


def _select_tensors(facts: ModelFacts, chosen: tuple[int, ...]) -> dict[str, TensorInfo]:
    position = {layer: index for index, layer in enumerate(chosen)}
    selected: dict[str, TensorInfo] = {}
    found: set[int] = set()
    for name, tensor in facts.tensors.items():
        match = _LAYER_NAME.match(name)
        if match is None:
            if re.search(r"\.\d+\.", name):
                raise ModelError(
                    f"{facts.path} ({facts.architecture}) has a tensor {name!r}: init-student"
                    " supports only layers named model.layers.N and transformer.h.N"
                )
            selected[name] = tensor
            continue
        layer = int(match[2])
        found.add(layer)
        if layer in position:
            selected[f"{match[1]}{position[layer]}{match[3]}"] = tensor
    if found != set(range(facts.num_layers)):
        raise ModelError(
            f"{facts.path} ({facts.architecture}) has the layers {sorted(found)} in its weights,"
            f" but {facts.layers_key} is {facts.num_layers}: init-student supports only layers"
            " named model.layers.N and transformer.h.N"
        )
    return selected


def _select_config(facts: ModelFacts, chosen: tuple[int, ...]) -> dict[str, Any]:
    """Return the teacher's config for the chosen layers, lists with one entry a layer included."""
    config: dict[str, Any] = dict(facts.config)
    config[facts.layers_key] = len(chosen)
    for key, value in facts.config.items():
        if not isinstance(value, list) or "layer" not in key or not value:
            continue
        if len(value) == facts.num_layers:
            config[key] = [value[layer] for layer in chosen]
        elif all(isinstance(item, int) for item in value):
            config[key] = [index for index, layer in enumerate(chosen) if layer in value]
        else:
            raise ModelError(
                f"{facts.path / 'config.json'}: {key} has {len(value)} entries for"
                f" {facts.num_layers} layers: init-student cannot tell which entries belong to the"
                " chosen layers"
            )
    _refuse_periodic_rules(facts.config, facts)
    return config


def _refuse_periodic_rules(config: Mapping[str, Any], facts: ModelFacts) -> None:
    """Refuse rules by layer number, which would apply to other layers in the student."""
    by_number = ("first_k_dense_replace", "decoder_sparse_step", "moe_layer_freq")
    periodic = [key for key in by_number if config.get(key) not in (None, 0, 1)]
    if config.get("use_sliding_window") and "layer_types" not in config:
        periodic.append("max_window_layers")
    if periodic:
        raise ModelError(
            f"{facts.path / 'config.json'}: {periodic[0]} sets the type of a layer by its number,"
            " and the layers of the student get other numbers: init-student does not support it"
        )
