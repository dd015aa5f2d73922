"""A student has exactly the chosen layers of its teacher, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distillm_ray.errors import ModelError
from distillm_ray.models.directory import check_model_directory
from distillm_ray.models.students import init_student
from tests import make

TOKENIZER = make.tokenizer(["<unk>", "<s>", "</s>"], ["red", "green", "blue"])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied four-layer model in bfloat16 whose config lists the type of every layer."""
    directory = tmp_path_factory.mktemp("teachers") / "qwen"
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        eos_token_id=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    )
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teachers") / "gpt2"
    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=3, n_head=2, n_positions=32, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


def test_the_chosen_layers_and_all_other_parameters_equal_the_teachers(
    qwen: Path, tmp_path: Path
) -> None:
    summary = init_student(qwen, tmp_path / "student", [0, 3])
    teacher = AutoModelForCausalLM.from_pretrained(qwen)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.dtype == torch.bfloat16
    expected = dict(teacher.state_dict())
    names = list(student.state_dict())
    assert len(names) == len(expected) - 2 * len([n for n in expected if ".layers.1." in n])
    for name, value in student.state_dict().items():
        assert torch.equal(value, expected[name.replace(".layers.1.", ".layers.3.")]), name
    assert summary.num_parameters == student.num_parameters()
    assert summary.num_teacher_parameters == teacher.num_parameters()


def test_a_students_logits_are_the_teachers_with_the_other_layers_skipped(
    gpt2: Path, tmp_path: Path
) -> None:
    init_student(gpt2, tmp_path / "student", [0, 2])
    teacher = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    layers = teacher.get_submodule("transformer.h")
    assert isinstance(layers, torch.nn.ModuleList)
    del layers[1]
    ids = torch.tensor([[1, 3, 4, 5]])
    with torch.no_grad():
        expected = teacher(ids, use_cache=False).logits
        assert torch.equal(student(ids, use_cache=False).logits, expected)


def test_lists_with_one_entry_a_layer_follow_the_layers(qwen: Path, tmp_path: Path) -> None:
    types = json.loads((qwen / "config.json").read_text())["layer_types"]
    assert types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    init_student(qwen, tmp_path / "student", [1, 2, 3])
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] + ["sliding_attention"] * 2
    assert config["num_hidden_layers"] == 3


def test_a_student_fits_its_teacher(qwen: Path, tmp_path: Path) -> None:
    init_student(qwen, tmp_path / "student", [2])
    teacher = check_model_directory(qwen, "teacher")
    student = check_model_directory(tmp_path / "student", "student")
    assert student.tokenizer_fingerprint == teacher.tokenizer_fingerprint
    assert (student.num_layers, student.tied) == (1, True)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 4, 7], r"between 0 and 3, got 4, 7: .* has 4 layers"),
        ([-1], r"between 0 and 3, got -1"),
        ([1, 0, 1], r"layers must differ, got 1 repeatedly"),
        ([], r"at least one of the teacher's layers"),
    ],
)
def test_wrong_layer_numbers_are_named(
    qwen: Path, tmp_path: Path, layers: list[int], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        init_student(qwen, tmp_path / "student", layers)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_touched(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exists: name a new directory"):
        init_student(qwen, tmp_path, [0])


def test_other_layer_names_are_refused_by_name(qwen: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    teacher = Path(shutil.copytree(qwen, tmp_path / "teacher"))
    weights = load_file(teacher / "model.safetensors")
    renamed = {name.replace("model.layers.", "decoder.block."): t for name, t in weights.items()}
    save_file(renamed, teacher / "model.safetensors")
    with pytest.raises(ModelError, match=r"has a tensor 'decoder\.block\.\d.*model\.layers\.N"):
        init_student(teacher, tmp_path / "student", [0])


def test_rules_by_layer_number_are_refused(qwen: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(qwen, tmp_path / "teacher"))
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "first_k_dense_replace": 2}))
    with pytest.raises(
        ModelError, match="first_k_dense_replace sets the type of a layer by its number"
    ):
        init_student(teacher, tmp_path / "student", [0])
