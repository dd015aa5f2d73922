"""The attention of packed rows on GPUs, with the kernels replaced by stand-ins on the CPU.

Axes: L packed tokens, D hidden size; B = 1 row, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distillm_ray.models import row_path
from distillm_ray.models.directory import Role
from distillm_ray.models.packed import PackedModel, load_packed_model
from distillm_ray.models.packed_attention import BY_SEQUENCE, UnknownAttention, by_sequence
from distillm_ray.models.row_path import RowPath, backbone_of, run_row
from distillm_ray.models.varlen_attention import VARLEN, varlen, why_not_varlen
from tests import make, varlen_kernels
from tests.test_packed_attention import LENGTHS, SIZES
from tests.test_packed_attention import make as make_known
from tests.varlen_kernels import Kernels

OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "full and sliding layers": {
        "model_type": "qwen2",
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 4,
    },
    "heads of twelve values": {"model_type": "llama", "head_dim": 12},
    "values smaller than keys": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "first_k_dense_replace": 3,
    },
}
KNOWN = ("llama", "gpt2", "sliding window")


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    with varlen_kernels.installed() as kernels:
        yield kernels


def build(name: str) -> PreTrainedModel:
    """A random model of three layers, in evaluation mode."""
    if name not in OTHERS:
        return make_known(name)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SIZES, **OTHERS[name]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.4)
    return model


def run(model: PreTrainedModel, attention: str, packs_up_to: int | None = None) -> Tensor:
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    token_ids_L = torch.randint(50, (sum(LENGTHS),), generator=generator)
    position_ids_L = torch.cat([torch.arange(length) for length in LENGTHS])
    path = RowPath(attention=attention, packs_up_to=packs_up_to)
    return run_row(backbone_of(model), token_ids_L, position_ids_L, path)


# ---- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*KNOWN, *OTHERS])
def test_a_packed_row_equals_eager_attention_on_each_sequence_in_values_and_gradients(
    architecture: str, kernels: Kernels
) -> None:
    weights_LD = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(2))
    results = []
    for attention, packs_up_to in ((VARLEN, None), ("eager", 0)):
        model = build(architecture)
        hidden_LD = run(model, attention, packs_up_to)
        (hidden_LD * weights_LD).sum().backward()
        gradients = [item.grad for item in model.parameters() if item.grad is not None]
        results.append((hidden_LD.detach(), gradients))
    (packed_LD, packed_gradients), (alone_LD, alone_gradients) = results
    torch.testing.assert_close(packed_LD, alone_LD, rtol=0, atol=5e-6)
    assert len(packed_gradients) == len(alone_gradients) > 10
    for ours, theirs in zip(packed_gradients, alone_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert len(kernels.forward) == len(kernels.backward) == 3, "one launch a layer and direction"


def test_the_logits_of_a_packed_row_are_those_of_each_sequence_alone(kernels: Kernels) -> None:
    model = build("llama")
    with torch.no_grad():
        logits_LV = model.lm_head(run(model, VARLEN))
        expected_LV = model.lm_head(run(model, "eager", 0))
    torch.testing.assert_close(logits_LV, expected_LV, rtol=0, atol=5e-6)
    assert kernels.forward and not kernels.backward


def test_a_row_that_was_scored_can_be_trained_on(kernels: Kernels) -> None:
    with torch.inference_mode():  # a scorer's; the same row may be trained on afterwards
        run(build("llama"), VARLEN)
    run(build("llama"), VARLEN).sum().backward()
    assert {tuple(call["starts"]) for call in kernels.forward} == {(0, 5, 6, 15, 18)}


def test_a_window_of_four_reaches_three_tokens_back(kernels: Kernels) -> None:
    run(build("full and sliding layers"), VARLEN)
    assert [call["window"] for call in kernels.forward] == [(-1, 0), (3, 0), (-1, 0)]


# ---- what the kernels do not compute -------------------------------------------------------------


def attend(size: int = 8, causal: bool = True, **arguments: Any) -> Tensor:
    module = torch.nn.Module()
    module.is_causal = causal  # type: ignore[assignment]
    module.num_key_value_groups = 1  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, size, generator=generator) for _ in range(3))
    attention = arguments.pop("attention", varlen)
    torch.manual_seed(1)
    output, _ = attention(module, query, key, value, None, **arguments)
    return output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"softcap": 2.0}, "caps its scores"),
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"causal": False}, "not causal"),
        ({"size": 257}, "heads of 264 values, and the kernel takes at most 256"),
        ({"position_bias": torch.ones(1)}, "passes position_bias to its attention"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(
    arguments: dict[str, Any], why: str, kernels: Kernels
) -> None:
    with pytest.raises(UnknownAttention, match=why):
        attend(boundaries=(0, 2, 6), **arguments)
    assert not kernels.forward


def test_dropout_runs_one_sequence_at_a_time(kernels: Kernels) -> None:
    found = attend(boundaries=(0, 2, 6), dropout=0.5)
    expected = attend(attention=by_sequence, boundaries=(0, 2, 6), dropout=0.5)
    assert torch.equal(found, expected)
    assert not torch.equal(found, attend(boundaries=(0, 2, 6)))
    assert len(kernels.forward) == 1, "the row without dropout"


def test_a_gpu_or_a_dtype_without_the_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert why_not_varlen(gpu, torch.float32) == "varlen: needs bfloat16 or float16, got float32"
    assert "capability 8.0, got 7.5" in why_not_varlen(gpu, torch.bfloat16)
    capability = (9, 0)
    assert why_not_varlen(gpu, torch.bfloat16) == ""


# ---- chosen at start -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "llama"
    config = make.llama_config(initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Kernels:
    """Models on the CPU count as models on a GPU that has the kernels."""
    monkeypatch.setattr(row_path, "_is_on_gpu", lambda model: True)
    monkeypatch.setattr(row_path, "why_not_varlen", lambda device, dtype: "")
    return kernels


def load(directory: Path, role: Role = "student") -> PackedModel:
    return load_packed_model(directory, role=role, dtype=torch.float32, device=torch.device("cpu"))


def test_a_model_on_a_gpu_takes_the_kernels_after_both_directions_are_proven(
    directory: Path, on_gpu: Kernels
) -> None:
    packed = load(directory)
    assert packed.path.attention == row_path.attention_of(packed.model) == VARLEN
    assert not packed.remark
    proof = packed.path.proof
    assert proof is not None and proof.gradients is not None and proof.from_eager is not None
    assert max(proof.from_alone, proof.from_eager, proof.gradients) < 2e-5
    assert on_gpu.backward


def test_a_model_that_is_not_trained_runs_no_backward_pass(
    directory: Path, on_gpu: Kernels
) -> None:
    path = load(directory, "teacher").path
    assert path.attention == VARLEN and path.proof is not None and path.proof.gradients is None
    assert on_gpu.forward and not on_gpu.backward


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"ignore_starts": True}, "varlen: state leaks from one sequence of a row into the next"),
        ({"scale_factor": 1.1}, "varlen: differs from eager attention by"),
        ({"fails": "no kernel image"}, "varlen: its forward pass fails: RuntimeError: no kernel"),
        ({"window_in_backward": False}, "varlen: its gradients differ from those of by_sequence"),
    ],
)
def test_kernels_that_are_wrong_are_found_at_start_and_not_used(
    wrong: dict[str, Any], why: str, directory: Path, on_gpu: Kernels
) -> None:
    for key, value in wrong.items():
        setattr(on_gpu, key, value)
    packed = load(directory)
    assert packed.path.attention == row_path.attention_of(packed.model) == BY_SEQUENCE
    assert why in packed.remark


def test_a_student_in_float32_on_a_gpu_says_why_it_runs_one_sequence_at_a_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_path, "_is_on_gpu", lambda model: True)
    packed = load(directory)
    assert packed.path.attention == BY_SEQUENCE
    assert packed.path.notes == ("varlen: needs bfloat16 or float16, got float32",)


def test_on_a_cpu_nothing_is_said_of_the_kernels(directory: Path) -> None:
    path = load(directory).path
    assert (path.attention, path.notes) == (BY_SEQUENCE, ())
