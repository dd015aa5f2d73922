"""`learner.activation_checkpointing`: the same gradients from fewer saved activations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from distillm_ray.batching import pack
from distillm_ray.config import (
    ActivationCheckpointing,
    CrossEntropy,
    LoraConfig,
    LossConfig,
    StudentConfig,
)
from distillm_ray.errors import ConfigError
from distillm_ray.learner.student_model import build_student, run_row, training_request
from distillm_ray.models.packed_attention import BY_SEQUENCE
from distillm_ray.types import MicroBatchPlan
from tests import make

CPU = torch.device("cpu")
LAYERS = 6
MODELS: dict[str, dict[str, Any]] = {
    "llama": make.SMALL | {"num_hidden_layers": LAYERS},
    "gpt2": {"vocab_size": 64, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 64},
}
LOSS = LossConfig(terms=(CrossEntropy(),))


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **MODELS[request.param])
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def gradients(
    directory: Path, lora: LoraConfig | None, checkpointing: ActivationCheckpointing
) -> tuple[dict[str, Tensor], int]:
    """Of one packed row of three sequences, and the bytes that are saved for the backward pass."""
    torch.manual_seed(1)
    student = build_student(
        StudentConfig(model=directory, dtype="float32", lora=lora),
        LOSS,
        vocabulary_size=64,
        device=CPU,
        zero_stage=1,
        activation_checkpointing=checkpointing,
    ).train()
    assert student.path.attention == BY_SEQUENCE
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:  # zero at the start, and the gradient of A with it
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    rng = np.random.default_rng(3)
    sequences = tuple(
        make.planned(
            make.rollout(
                str(length),
                prompt=rng.integers(0, 64, 3, dtype=np.int32),
                response=rng.integers(0, 64, length, dtype=np.int32),
            ),
            term_weights=(0.1,),
        )
        for length in (5, 9, 2)
    )
    batch = pack(MicroBatchPlan(sequences=sequences), None)
    weights = {one.untyped_storage().data_ptr() for one in student.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = run_row(student, batch, training_request(batch, LOSS, None, CPU), CPU)
    result.loss.backward()
    found = {
        name: parameter.grad
        for name, parameter in student.named_parameters()
        if parameter.grad is not None
    }
    return found, sum(saved.values())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["whole", "lora"])
def test_gradients_are_equal_and_fewer_bytes_are_saved(
    directory: Path, lora: LoraConfig | None
) -> None:
    expected, most = gradients(directory, lora, "none")
    half, fewer = gradients(directory, lora, 2)
    full, fewest = gradients(directory, lora, "full")
    assert all(one.abs().max() > 0 for one in expected.values())
    for found in (half, full):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert fewest < fewer < most
    assert fewest < 0.4 * most


def test_a_number_that_checkpoints_the_first_layer_alone_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="must be less than the student's"):
        gradients(directory, None, 99)


def test_a_class_without_checkpointing_is_refused_by_key(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for base in (LlamaForCausalLM, GPT2LMHeadModel):
        monkeypatch.setattr(base, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"learner\.activation_checkpointing must be none for"):
        gradients(directory, None, "full")
