"""Model directories: facts read from headers, and an error message for every bad directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distillm_ray.config import TargetsConfig
from distillm_ray.errors import ConfigError, ModelError
from distillm_ray.models.directory import (
    Role,
    check_lengths,
    check_model_directory,
    check_pair,
    check_targets,
)
from distillm_ray.models.logit_rules import LogitRule
from tests import make

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = ["red", "green", "blue"]


def write_tokenizer(directory: Path, words: list[str]) -> None:
    make.tokenizer(SPECIAL, words).save_pretrained(directory)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as transformers saves it, with 8 head rows for 6 tokens."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make.llama(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=16,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    ).save_pretrained(directory)
    write_tokenizer(directory, WORDS)
    return directory


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_the_facts_of_a_directory_are_those_of_the_saved_model(model: Path) -> None:
    facts = check_model_directory(model, "teacher")
    embeddings = 2 * 8 * 8
    attention = 8 * 8 + 2 * (8 * 4) + 8 * 8
    layer = attention + 3 * 8 * 16 + 2 * 8
    assert facts.num_parameters == embeddings + 2 * layer + 8
    assert (facts.architecture, facts.num_layers) == ("LlamaForCausalLM", 2)
    assert (facts.hidden_size, facts.num_rows, facts.vocabulary_size) == (8, 8, 6)
    assert (facts.context_length, facts.tied, facts.end_token_ids) == (32, False, (2,))
    assert facts.head_rule == LogitRule()


def test_a_bad_model_is_refused_before_anything_heavy_is_imported(model: Path) -> None:
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    code = (
        "import sys; from pathlib import Path; from distillm_ray.models.directory import *\n"
        f"try: check_model_directory(Path({str(model)!r}), 'teacher')\n"
        "except ModelError as error: assert 'has no weights' in str(error)\n"
        "print(*[m for m in ('torch', 'ray', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""


def test_several_end_tokens_are_taken_from_the_generation_config(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 4]}))
    assert check_model_directory(model, "student").end_token_ids == (2, 4, 5)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"final_logit_softcapping": 30.0}, LogitRule(soft_cap=30.0)),
        ({"model_type": "cohere", "logit_scale": 0.5}, LogitRule(scale=0.5)),
        ({"model_type": "granite", "logits_scaling": 4.0}, LogitRule(scale=0.25)),
    ],
)
def test_a_head_rule_is_taken_from_the_config(
    model: Path, settings: dict[str, Any], rule: LogitRule
) -> None:
    edit_config(model, **settings)
    assert check_model_directory(model, "teacher").head_rule == rule


def test_an_unknown_head_rule_is_refused_by_name(model: Path) -> None:
    edit_config(model, lm_head_multiplier=0.5)
    with pytest.raises(ModelError, match=r"teacher\.model: .*: lm_head_multiplier = 0\.5"):
        check_model_directory(model, "teacher")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"teacher\.model: .*nowhere does not exist"):
        check_model_directory(tmp_path / "nowhere", "teacher")


def test_a_directory_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"student\.model: .* has no weights: no \*\.safetensors"):
        check_model_directory(model, "student")


def test_a_directory_with_pickles_only_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickles only \(pytorch_model\.bin\).*safetensors"):
        check_model_directory(model, "student")


def test_a_missing_shard_is_named(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors, which"):
        check_model_directory(model, "student")


def test_incomplete_weights_are_detected_from_the_header(model: Path) -> None:
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(
        ModelError, match=rf"incomplete: its header describes {len(content)} bytes, the file has"
    ):
        check_model_directory(model, "student")
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"not a safetensors file .*Git LFS pointer"):
        check_model_directory(model, "student")


def test_custom_code_must_be_trusted_by_name(model: Path) -> None:
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling.Own"})
    with pytest.raises(ModelError, match=r"set teacher\.trust_remote_code=true"):
        check_model_directory(model, "teacher")
    check_model_directory(model, "teacher", trust_remote_code=True)


def test_a_model_that_is_not_a_decoder_is_refused(model: Path) -> None:
    edit_config(model, architectures=["BertForMaskedLM"])
    with pytest.raises(ModelError, match=r"decoder-only language model.*BertForMaskedLM"):
        check_model_directory(model, "teacher")


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_accepted(model: Path) -> None:
    """The image placeholder of a text-only model, for one."""
    write_tokenizer(model, [*WORDS, "a", "b", "<image>"])
    facts = check_model_directory(model, "student")
    assert (facts.num_rows, facts.vocabulary_size) == (8, 8)
    assert facts.tokens[8] == "<image>"


def test_a_token_that_only_the_tokenizers_settings_name_counts(model: Path) -> None:
    add_token_in_settings(model, 6, "<|im_end|>")
    facts = check_model_directory(model, "student")
    assert facts.vocabulary_size == 7
    assert facts.end_token_ids == (2, 6)


def test_end_tokens_without_a_row_are_refused(model: Path) -> None:
    for index, word in enumerate(("a", "b", "<|im_end|>"), start=6):
        add_token_in_settings(model, index, word)
    edit_config(model, eos_token_id=8)
    (model / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=r"\[8\] of .* must be below the model's 8 rows"):
        check_model_directory(model, "student")


def add_token_in_settings(directory: Path, index: int, token: str) -> None:
    """Make `token` the end token, by tokenizer_config.json alone."""
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    entry = {"content": token, "special": True, "lstrip": False, "rstrip": False}
    entry |= {"normalized": False, "single_word": False}
    settings.setdefault("added_tokens_decoder", {})[str(index)] = entry
    path.write_text(json.dumps(settings | {"eos_token": token}))


@pytest.mark.parametrize(
    ("role", "settings", "said"),
    [
        ("teacher", {"quant_method": "gptq", "bits": 4}, "needs optimum and gptqmodel, not"),
        ("teacher", {"load_in_4bit": True}, "quantized by bitsandbytes; loading it needs"),
        ("teacher", {"quant_method": "int1"}, "by 'int1', which transformers cannot load"),
        ("student", {"quant_method": "fp8"}, r"are quantized \(fp8\), which cannot be trained"),
    ],
)
def test_a_quantized_model_that_cannot_be_used_is_refused_with_what_it_needs(
    model: Path, role: Role, settings: dict[str, Any], said: str
) -> None:
    edit_config(model, quantization_config=settings)
    with pytest.raises(ModelError, match=rf"{role}\.model: .*{said}"):
        check_model_directory(model, role)


def test_a_quantized_teacher_whose_packages_are_there_is_accepted(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "fp8"})
    check_model_directory(model, "teacher")


def test_a_model_without_an_end_token_is_refused(model: Path) -> None:
    edit_config(model, eos_token_id=None)
    (model / "generation_config.json").write_text("{}")
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no end token"):
        check_model_directory(model, "student")


def test_padded_tails_may_differ_and_the_real_size_is_reported(model: Path, tmp_path: Path) -> None:
    student = Path(shutil.copytree(model, tmp_path / "student"))
    edit_config(student, vocab_size=64)
    pair = check_model_directory(model, "teacher"), check_model_directory(student, "student")
    assert check_pair(*pair) == 6


def test_the_first_id_with_two_meanings_is_named_with_both_tokens(
    model: Path, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(model, tmp_path / "student"))
    write_tokenizer(student, ["red", "yellow", "green"])
    pair = check_model_directory(model, "teacher"), check_model_directory(student, "student")
    with pytest.raises(ModelError, match=r"id 4 is 'green' for the teacher .* and 'yellow' for"):
        check_pair(*pair)


def test_a_token_that_only_one_side_has_is_refused(model: Path, tmp_path: Path) -> None:
    student = Path(shutil.copytree(model, tmp_path / "student"))
    write_tokenizer(student, [*WORDS, "mauve"])
    pair = check_model_directory(model, "teacher"), check_model_directory(student, "student")
    with pytest.raises(ModelError, match=r"id 6 is no token for the teacher .* and 'mauve' for"):
        check_pair(*pair)


def test_ids_beyond_the_rows_of_one_model_are_not_shared(model: Path, tmp_path: Path) -> None:
    """The tokenizers agree; the student has rows for two tokens more than the teacher."""
    write_tokenizer(model, [*WORDS, "a", "b", "<image>", "<video>"])
    student = Path(shutil.copytree(model, tmp_path / "student"))
    edit_config(student, vocab_size=64)
    pair = check_model_directory(model, "teacher"), check_model_directory(student, "student")
    assert [facts.vocabulary_size for facts in pair] == [8, 10]
    assert check_pair(*pair) == 8


def test_a_placeholder_beyond_both_models_rows_may_differ(model: Path, tmp_path: Path) -> None:
    student = Path(shutil.copytree(model, tmp_path / "student"))
    write_tokenizer(student, [*WORDS, "a", "b", "<image>"])
    write_tokenizer(model, [*WORDS, "a", "b", "<video>"])
    pair = check_model_directory(model, "teacher"), check_model_directory(student, "student")
    assert check_pair(*pair) == 8


def test_sequences_longer_than_the_context_are_refused_with_the_sum(model: Path) -> None:
    facts = check_model_directory(model, "student")
    fits = {"max_prompt_tokens": 16, "max_response_tokens": 16}
    too_long = {"max_prompt_tokens": 16, "max_response_tokens": 17}
    check_lengths(make.config(data=fits), facts, facts)
    with pytest.raises(ConfigError, match=r"the student's context, got 16 \+ 17 = 33 > 32"):
        check_lengths(make.config(data=too_long), None, facts)


def test_top_k_beyond_the_vocabulary_is_refused() -> None:
    check_targets(TargetsConfig(type="top_k", k=6), 6)
    with pytest.raises(ConfigError, match=r"targets\.k must be at most .* got 7 > 6"):
        check_targets(TargetsConfig(type="top_k", k=7), 6)
