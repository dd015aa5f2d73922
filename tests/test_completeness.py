"""A directory that lacks weights, or whose config belongs to other weights, is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillm_ray.errors import ModelError
from distillm_ray.models.completeness import check_complete
from distillm_ray.models.directory import Role, check_model_directory
from distillm_ray.new_student import named_student
from tests import make

HEAD = "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def save(directory: Path, *, tied: bool = False) -> Path:
    make.llama(
        vocab_size=8, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2
    ).save_pretrained(directory)
    make.tokenizer(["<unk>", "<s>", "</s>"], ["red", "green"]).save_pretrained(directory)
    return directory


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def check(directory: Path, role: Role = "student") -> None:
    check_complete(check_model_directory(directory, role))


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_complete(tmp_path: Path, tied: bool) -> None:
    check(save(tmp_path / "model", tied=tied))


@pytest.mark.parametrize("role", ["teacher", "student", "model"])
@pytest.mark.parametrize("name", [DOWN, HEAD, "model.norm.weight"])
def test_a_missing_tensor_is_named_whoever_uses_the_model(
    tmp_path: Path, role: Role, name: str
) -> None:
    model = save(tmp_path / "model")
    edit_tensors(model, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"{name}: they would start as random numbers"):
        check(model, role)


def test_layers_beyond_those_of_the_config_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    edit_json(model / "config.json", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"model\.layers\.1\..*num_hidden_layers: 1"):
        check(model)


def test_tensors_beside_the_layers_may_be_left_over(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    edit_tensors(model, lambda tensors: tensors.update({"v_head.weight": torch.ones(1, 16)}))
    check(model)


def test_a_vocabulary_that_is_not_that_of_the_weights_is_refused_with_both_numbers(
    tmp_path: Path,
) -> None:
    model = save(tmp_path / "model")
    edit_json(model / "config.json", vocab_size=9)
    with pytest.raises(ModelError, match=r"vocab_size .* got 9 and 8"):
        check(model)


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    edit_json(model / "config.json", intermediate_size=48)
    with pytest.raises(ModelError, match="do not have the shapes of config"):
        check(model)


def test_a_tied_head_that_is_stored_with_other_values_is_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    edit_json(model / "config.json", tie_word_embeddings=True)
    with pytest.raises(ModelError, match="tie_word_embeddings must be false"):
        check(model)


def test_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    model = save(tmp_path / "model", tied=True)
    edit_tensors(
        model,
        lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"].clone()}),
    )
    check(model)


def test_a_second_copy_in_another_format_is_not_counted(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    alone = check_model_directory(model, "student").num_parameters
    save_file({"layers.0.wq": torch.ones(3)}, model / "consolidated.safetensors")
    assert check_model_directory(model, "student").num_parameters == alone


def test_weights_under_a_name_that_nobody_loads_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    (model / "model.safetensors").rename(model / "weights.safetensors")
    with pytest.raises(ModelError, match=r"must hold model\.safetensors.*weights\.safetensors"):
        check(model)


@pytest.mark.parametrize("value", [True, 2.0, "2", [2, "3"]])
def test_an_end_token_that_is_no_id_is_refused(tmp_path: Path, value: Any) -> None:
    model = save(tmp_path / "model")
    edit_json(model / "generation_config.json", eos_token_id=value)
    with pytest.raises(ModelError, match="eos_token_id"):
        check(model)


def test_no_student_is_made_of_an_incomplete_teacher(tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher")
    edit_tensors(teacher, lambda tensors: tensors.pop(DOWN))
    with pytest.raises(ModelError, match=DOWN):
        named_student(teacher, tmp_path / "student", [0])
    assert not (tmp_path / "student").exists()


def test_biases_and_scales_that_the_config_has_no_place_for_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(model, lambda tensors: tensors.update({bias: torch.ones(16)}))
    with pytest.raises(ModelError, match=f"{bias}.*they would be left out"):
        check(model)


def test_quantized_weights_without_their_config_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    edit_tensors(model, lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)}))
    with pytest.raises(ModelError, match=f"{DOWN} in I8, but .* no quantization_config"):
        check(model)


def test_masks_of_old_versions_may_be_left_over(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = tmp_path / "model"
    small = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8, eos_token_id=2)
    GPT2LMHeadModel(small).save_pretrained(model)
    make.tokenizer(["<unk>", "<s>", "</s>"], ["red", "green"]).save_pretrained(model)
    check(model)

    def as_on_the_hub(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(model, as_on_the_hub)
    check(model)


def test_weights_in_two_places_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    index = model / "model.safetensors.index.json"
    save_file(tensors, model / "a.safetensors")
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.safetensors")})
    )
    with pytest.raises(ModelError, match="transformers reads the one, vLLM the others"):
        check(model)
    (model / "model.safetensors").unlink()
    check(model)
    save_file({HEAD: tensors[HEAD]}, model / "b.safetensors")
    both = dict.fromkeys(tensors, "a.safetensors") | {"x": "b.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": both}))
    with pytest.raises(ModelError, match=f"{HEAD} in two files"):
        check(model)


@pytest.mark.parametrize("weight_map", [[], {}, {"a": 3}])
def test_a_damaged_index_is_refused(tmp_path: Path, weight_map: Any) -> None:
    model = save(tmp_path / "model")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"weight_map of .* must name a file for each tensor"):
        check(model)


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "nope"}, {"rope_parameters": {"rope_type": "nope"}}]
)
def test_a_config_that_makes_no_model_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = save(tmp_path / "model")
    edit_json(model / "config.json", **changes)
    with pytest.raises(ModelError, match=r"makes no model of its config\.json|cannot be loaded"):
        check(model)
