"""Student weights in buckets and files, without ZeRO-3 (see integration/test_learner.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from distillm_ray.config import LoraConfig
from distillm_ray.learner.student_model import add_adapters
from distillm_ray.types import AdapterBase
from distillm_ray.weights.adapters import with_adapters
from distillm_ray.weights.buckets import read_tensors, tensor_names, to_tensors
from distillm_ray.weights.export import export_model
from distillm_ray.weights.gather import gather
from distillm_ray.weights.gather_adapters import adapted_weights, gather_adapters
from tests import make


def tiny_model(*, tied: bool = True) -> LlamaForCausalLM:
    return make.llama(tie_word_embeddings=tied)


def gathered(
    model: PreTrainedModel, dtype: torch.dtype, **arguments: int
) -> dict[str, torch.Tensor]:
    found = {}
    for bucket in gather(model, dtype, keep=True, **arguments):
        found.update(to_tensors(bucket))
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_values_are_those_of_the_saved_checkpoint(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tied=tied)
    model.save_pretrained(tmp_path)
    saved = dict(read_tensors(tmp_path))
    found = gathered(model, torch.float32)
    assert found.keys() == saved.keys()
    assert ("lm_head.weight" in found) == (not tied)
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name


def test_bfloat16_survives_bit_for_bit() -> None:
    model = tiny_model()
    for name, tensor in gathered(model, torch.bfloat16).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, model.get_parameter(name).detach().bfloat16())


def test_only_a_tensor_larger_than_a_bucket_exceeds_its_size_and_has_it_alone() -> None:
    buckets = list(gather(tiny_model(), torch.float32, keep=True, bucket_elements=500))
    assert len(buckets) > 2
    for bucket in buckets:
        elements = sum(values.nbytes // 4 for _, _, values in bucket.values())
        assert elements <= 500 or len(bucket) == 1


def test_a_rank_without_keep_gets_the_same_number_of_empty_buckets() -> None:
    model = tiny_model()
    kept = list(gather(model, torch.float32, keep=True, bucket_elements=500))
    passed = list(gather(model, torch.float32, keep=False, bucket_elements=500))
    assert passed == [{}] * len(kept)


def test_a_bucket_is_a_copy_and_not_a_view_of_the_model() -> None:
    model = tiny_model()
    [bucket] = gather(model, torch.float32, keep=True)
    before = dict(to_tensors(bucket))["model.norm.weight"].clone()
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    assert torch.equal(dict(to_tensors(bucket))["model.norm.weight"], before)


def test_lora_is_merged_under_the_names_of_the_plain_model() -> None:
    model = tiny_model(tied=False)
    plain_names = set(gathered(model, torch.float32))
    add_adapters(model, LoraConfig(rank=2, alpha=6.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    token_ids = torch.arange(1, 9)[None]
    model.eval()
    expected = model(input_ids=token_ids).logits
    found = gathered(model, torch.float32)
    assert set(found) == plain_names
    merged = tiny_model(tied=False).eval()
    merged.load_state_dict(found)
    assert torch.allclose(merged(input_ids=token_ids).logits, expected, atol=1e-5)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (6.0 / 2)  # pyright: ignore
    expected_weight = layer.base_layer.weight + product  # pyright: ignore
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(found[name], expected_weight, atol=1e-6)


def adapted(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model loaded from `directory` with adapters that change it."""
    plain = tiny_model(tied=False) if name == "llama" else GPT2LMHeadModel(TINY_GPT2)
    plain.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    add_adapters(model, LoraConfig(rank=2, alpha=6.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(generator=generator)
    return model


TINY_GPT2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16])
def test_adapters_added_to_the_model_directory_are_the_merged_weights(
    name: str, trained: torch.dtype, published: torch.dtype, tmp_path: Path
) -> None:
    model = adapted(name, tmp_path, trained)
    weights = adapted_weights(model, tmp_path)
    buckets = list(gather_adapters(model, weights, keep=True))
    sizes = [sum(values.nbytes for _, _, values in bucket.values()) for bucket in buckets]
    assert sum(sizes) < sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / 2
    base = AdapterBase(
        trained=str(trained).removeprefix("torch."),
        published=str(published).removeprefix("torch."),
        scale=3.0,
    )
    found: dict[str, torch.Tensor] = {}
    for bucket in with_adapters(tmp_path, buckets, base, bucket_elements=500):
        found.update(to_tensors(bucket))
    merged = gathered(model, published)
    assert found.keys() == merged.keys()
    for key, tensor in merged.items():
        assert found[key].dtype == tensor.dtype == published
        assert torch.allclose(found[key].float(), tensor.float(), rtol=1e-2, atol=1e-2), key
        if (trained, published) == (torch.float32, torch.float32):
            assert torch.allclose(found[key], tensor, atol=1e-5), key


def test_ranks_without_keep_get_as_many_buckets_of_adapters(tmp_path: Path) -> None:
    model = adapted("llama", tmp_path)
    weights = adapted_weights(model, tmp_path)
    assert list(gather_adapters(model, weights, keep=False)) == [{}]


def test_whole_weights_are_published_where_the_directory_has_other_names(tmp_path: Path) -> None:
    model = adapted("llama", tmp_path)
    tensors = {f"old.{name}": tensor for name, tensor in read_tensors(tmp_path)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert adapted_weights(model, tmp_path) == {}
    assert adapted_weights(tiny_model(), tmp_path) == {}


def test_a_second_set_of_weights_in_the_directory_is_not_read(tmp_path: Path) -> None:
    model = adapted("llama", tmp_path)
    names = set(dict(read_tensors(tmp_path)))
    save_file({"layers.0.wq": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert set(dict(read_tensors(tmp_path))) == tensor_names(tmp_path) == names
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(dict(read_tensors(tmp_path))) == tensor_names(tmp_path) == names
    assert len(adapted_weights(model, tmp_path)) > 0


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    model = adapted("llama", tmp_path)
    buckets = list(gather_adapters(model, adapted_weights(model, tmp_path), keep=True))
    base = AdapterBase(trained="float32", published="float32", scale=3.0)
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no weight for the adapter model\.layers\.0\."):
        list(with_adapters(tmp_path, buckets, base))


@pytest.mark.parametrize("bucket_elements", [500, 10**9])
def test_an_exported_model_loads_in_plain_transformers(
    bucket_elements: int, tmp_path: Path
) -> None:
    model = tiny_model()
    student, directory = tmp_path / "student", tmp_path / "model"
    model.config.save_pretrained(student)
    (student / "README.md").write_text("describes the student before training")
    directory.mkdir()
    (directory / "earlier.safetensors").touch()
    buckets = gather(model, torch.bfloat16, keep=True, bucket_elements=bucket_elements)
    export_model(buckets, student, directory, torch.bfloat16, end_token_ids=[2])
    assert dict(read_tensors(directory)).keys() == gathered(model, torch.bfloat16).keys()
    assert not (directory / "README.md").exists()
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert loaded.dtype == torch.bfloat16
    token_ids = torch.arange(1, 9)[None]
    expected = model.bfloat16().eval()(input_ids=token_ids).logits
    assert torch.equal(loaded(input_ids=token_ids).logits, expected)


@pytest.mark.parametrize(("ends", "written"), [((7, 2), [7, 2]), ((2,), 2)])
def test_an_exported_model_names_the_end_tokens_that_it_was_trained_on(
    ends: tuple[int, ...], written: int | list[int], tmp_path: Path
) -> None:
    """Engines stop at what generation_config.json names, or config.json where it is missing."""
    model = tiny_model()
    student, directory = tmp_path / "student", tmp_path / "model"
    model.config.save_pretrained(student)
    buckets = gather(model, torch.float32, keep=True)
    export_model(buckets, student, directory, torch.float32, end_token_ids=ends)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((directory / name).read_text())["eos_token_id"] == written
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert loaded.generation_config.eos_token_id == written
    assert loaded.generation_config.bos_token_id == model.config.bos_token_id is not None


def test_an_export_keeps_the_students_other_generation_settings(tmp_path: Path) -> None:
    model = tiny_model()
    student, directory = tmp_path / "student", tmp_path / "model"
    model.config.save_pretrained(student)
    settings = {"eos_token_id": 2, "temperature": 0.6, "do_sample": True}
    (student / "generation_config.json").write_text(json.dumps(settings))
    buckets = gather(model, torch.float32, keep=True)
    export_model(buckets, student, directory, torch.float32, end_token_ids=(7, 2))
    found = json.loads((directory / "generation_config.json").read_text())
    assert found == settings | {"eos_token_id": [7, 2]}


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"earlier")
    with pytest.raises(FileNotFoundError):
        export_model([], tmp_path / "none", directory, torch.float32, end_token_ids=[2])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (directory / "model.safetensors").read_bytes() == b"earlier"
